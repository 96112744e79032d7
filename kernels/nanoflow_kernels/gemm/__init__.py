"""This package holds dense products: `dense` and `scaled` choose among libraries and our two kernels."""
