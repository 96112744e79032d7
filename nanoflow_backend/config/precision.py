"""Precision names the dtypes that a model is computed in: of its weights, of its activations and of its KV pages."""

from __future__ import annotations

from typing import Literal

import msgspec

Dtype = Literal["float32", "float16", "bfloat16"]
KvDtype = Literal["float32", "float16", "bfloat16", "float8_e4m3fn"]
Role = Literal["weights", "activations", "kv"]
ROLES: tuple[Role, ...] = ("weights", "activations", "kv")
ELEMENT_BYTES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "int32": 4}


class Precision(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The dtype of each role that a tensor of the model can have. Graphs name roles; programs look dtypes up here.

    Quantised weights have no role: the graph itself says that they, and what goes into their products, are e4m3.
    """

    weights: Dtype
    activations: Dtype
    kv: KvDtype

    @classmethod
    def of(cls, dtype: Dtype) -> Precision:
        """One dtype for all roles."""
        return cls(dtype, dtype, dtype)

    def dtype(self, name: str) -> str:
        """The dtype of a role; a dtype by its own name is the same in every precision."""
        return str(getattr(self, name)) if name in ROLES else name

    def element_bytes(self, name: str) -> int:
        """Bytes of an element of a role, or of a dtype that has its own name."""
        return ELEMENT_BYTES[self.dtype(name)]

    def __str__(self) -> str:
        """The dtype, where all roles share one."""
        if self.weights == self.activations == self.kv:
            return self.weights
        return ", ".join(f"{role} {self.dtype(role)}" for role in ROLES)


FLOAT32, BFLOAT16 = Precision.of("float32"), Precision.of("bfloat16")
