#!/bin/bash
# What the interpreter of triton 3.6.0 (TRITON_INTERPRET=1) makes of a cast from fp32 to float8e4nv (e4m3).
#
# Guessed: what an H200 does and torch does on a CPU: the nearest number of e4m3, the even one of two.
# Seen, on numbers from 2^-6 to 448, where e4m3 has its full precision:
# * Where rounding carries into the exponent, the carry is lost: 1.9376 becomes 1, where 2 is nearest; results are half
#   of what they should be, for 2.3 % of numbers that are spread evenly over the exponents.
# * Numbers half way between two are rounded up, not to the even one: 1.0625 becomes 1.125.
# And below 2^-6, where spacings stay the same (2^-9): digits are cut off, not rounded.
# Numbers that e4m3 has come through unchanged.
#
# Exits 1 if that changes. Needs Python 3 with venv, and pip's index (torch's CPU build will do).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 triton==3.6.0 numpy==1.26.4
cat > "$folder/cast.py" <<'PYTHON'
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def cast(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < N)
    tl.store(y_ptr + at, x.to(tl.float8e4nv), mask=at < N)


def interpreted(x):
    y = torch.zeros(len(x), dtype=torch.float8_e4m3fn)
    cast[(triton.cdiv(len(x), 1024),)](x, y, len(x), 1024)
    return y.float()


def nearest(x):
    """In arithmetic of its own: round to the spacing of x's exponent, the even one of two."""
    spacing = torch.exp2(torch.floor(torch.log2(x.double())).clamp(min=-6) - 3)
    return (torch.round(x.double() / spacing) * spacing).float()


print("triton", triton.__version__, "torch", torch.__version__)
changed = 0
for number, right, seen in [
    (1.9376, 2.0, 1.0),
    (1.0625, 1.0, 1.125),
    (0.015, 0.015625, 0.013671875),
    (1.125, 1.125, 1.125),
    (448.0, 448.0, 448.0),
]:
    x = torch.tensor([number])
    found, torchs, own = float(interpreted(x)), float(x.to(torch.float8_e4m3fn).float()), float(nearest(x))
    changed += (found, torchs, own) != (seen, right, right)
    print(f"{number:8}: nearest {own}, torch {torchs}, interpreter {found}")

x = torch.exp2(torch.rand(1 << 17, generator=torch.Generator().manual_seed(0)) * 14 - 6)
wrong = interpreted(x) != nearest(x)
halved = interpreted(x) < 0.75 * x
print(f"of {len(x)} numbers from 2^-6 to 2^8: {float(wrong.float().mean()):.2%} differ, {float(halved.float().mean()):.2%} are half")
changed += not 0.018 < float(halved.float().mean()) < 0.028
changed += not torch.equal(nearest(x), x.to(torch.float8_e4m3fn).float())
every = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
changed += not torch.equal(interpreted(every), every)
print("as described" if not changed else "CHANGED")
sys.exit(changed > 0)
PYTHON
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/cast.py"
