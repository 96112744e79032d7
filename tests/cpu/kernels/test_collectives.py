"""The peer-to-peer kernels in the kernel language's interpreter: ranks are processes over shared memory."""

from __future__ import annotations

import multiprocessing

import pytest
import torch
from nanoflow_kernels.collectives.peers import PAD_BYTES, Peers, peers_at, virtual_peers
from support.collectives.exchanges import KERNELS, Exchange
from support.collectives.peer_ranks import run_peers

if torch.cuda.is_available():
    pytest.skip("the kernels are compiled here: see tests/gpu", allow_module_level=True)
