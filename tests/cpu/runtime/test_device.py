"""Which GPUs a process has. No GPU is needed: what the driver would say is said here."""

import os

import pytest
import torch

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.engine import Engine
from nanoflow_backend.runtime.device import show_only


@pytest.mark.parametrize(
    ("visible", "gpus", "expected"),
    [
        ("", [1], "1"),
        ("", [3, 2], "3,2"),
        ("", [0], "0"),
        ("4,5", [1], "5"),
        ("GPU-a,GPU-b", [1, 0], "GPU-b,GPU-a"),
    ],
)
def test_only_these_are_shown(monkeypatch, visible, gpus, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: os.environ["CUDA_VISIBLE_DEVICES"].count(",") + 1)
    show_only(gpus)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == expected


def test_gpus_that_are_not_there_are_refused(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    with pytest.raises(ConfigError, match=r"gpus: expected ids below 2, for CUDA_VISIBLE_DEVICES is 6,7, got \[2\]"):
        show_only([2])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=r"gpus: torch does not see \[0\]; it sees 0"):
        Engine.from_pretrained("demo/tiny-llama", gpus=(0,))
