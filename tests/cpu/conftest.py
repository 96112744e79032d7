"""On a machine without a device its kernels run in the kernel language's interpreter, which is chosen at import."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
