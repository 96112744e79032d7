"""Device says what a program runs on: a GPU or the CPU, by name, size and free memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.runtime.host_memory import available_bytes

VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Device:
    """A GPU or the CPU: its name, its SMs and its free memory."""

    kind: Literal["cpu", "cuda"]  # as torch has it
    name: str  # as schedule files have it: "NVIDIA H200", "cpu"
    sms: int | None  # streaming multiprocessors

    def free_bytes(self, utilization: float = 1.0) -> int:
        """What may still be allocated; on a GPU, when `utilization` of its memory is ours."""
        if self.kind == "cpu":
            return available_bytes()
        free, total = torch.cuda.mem_get_info()
        return free - int((1 - utilization) * total)


def show_only(gpus: Sequence[int]) -> None:
    """Make these, in this order, the GPUs that this process and its children have. It must not have used one yet.

    Raises:
        ConfigError: there are no such GPUs.
    """
    visible = os.environ.get(VISIBLE)
    names = _names(max(gpus) + 1)
    if max(gpus) >= len(names):
        raise ConfigError(f"gpus: expected ids below {len(names)}, for {VISIBLE} is {visible}, got {list(gpus)}")
    os.environ[VISIBLE] = ",".join(names[gpu] for gpu in gpus)
    if torch.cuda.device_count() != len(gpus):
        raise ConfigError(f"gpus: torch does not see {list(gpus)}; it sees {torch.cuda.device_count()} of them")


def show_first(gpu: int) -> None:
    """Make one of the GPUs that this process has its first, device 0 of whatever thread, and keep the others visible,
    whose memory it may map. It must not have used one yet."""
    names = _names(torch.cuda.device_count())
    os.environ[VISIBLE] = ",".join([names[gpu], *names[:gpu], *names[gpu + 1 :]])


def _names(count: int) -> list[str]:
    """Of the GPUs that this process has, `count` of them where the environment does not say which."""
    visible = os.environ.get(VISIBLE)
    return visible.split(",") if visible else [str(gpu) for gpu in range(count)]


def find_kind(wanted: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """Raises: ConfigError, where a GPU is wanted and torch sees none."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: expected cpu or auto, got cuda: torch sees no CUDA device")
    return "cpu" if wanted == "cpu" or not torch.cuda.is_available() else "cuda"


def find_device(wanted: Literal["auto", "cpu", "cuda"]) -> Device:
    """Raises: ConfigError, as `find_kind` does."""
    if find_kind(wanted) == "cpu":
        return Device("cpu", "cpu", None)
    properties = torch.cuda.get_device_properties()
    return Device("cuda", properties.name, properties.multi_processor_count)
