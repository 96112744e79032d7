"""INTERPRETED says whether kernels run in the language's interpreter, which lacks some of a device's operations."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
