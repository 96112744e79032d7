"""Windows of attention: which layers have one by config.json, and what is said where that makes no sense."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from support.models.published import LLAMA2, QWEN2

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.models.hugging_face import from_hf

WITHOUT_WINDOW_KEYS = {name: value for name, value in QWEN2.items() if "window" not in name}
WINDOWED = QWEN2 | {"use_sliding_window": True, "sliding_window": 64}
ALTERNATING = ["full_attention", "sliding_attention"] * 12


@pytest.mark.parametrize(
    ("hf", "windowed"),
    [
        (QWEN2, []),
        (WINDOWED | {"max_window_layers": 0}, range(24)),
        (WINDOWED | {"sliding_window": None}, []),
        ({name: value for name, value in WINDOWED.items() if name != "use_sliding_window"}, []),
        (WINDOWED | {"max_window_layers": 23}, [23]),
        (WINDOWED | {"max_window_layers": 0, "layer_types": ALTERNATING}, range(1, 24, 2)),
        (WINDOWED | {"max_window_layers": 0, "layer_types": ["full_attention"] * 24}, []),
        (WITHOUT_WINDOW_KEYS | {"use_sliding_window": True}, []),
        (WITHOUT_WINDOW_KEYS | {"use_sliding_window": True, "num_hidden_layers": 29}, [28]),  # 28 is the class's
        (LLAMA2 | {"sliding_window": None}, []),
    ],
)
def test_layers_with_windows(hf: dict[str, Any], windowed: Sequence[int]) -> None:
    config = from_hf(hf, {})
    assert config.sliding_window == (hf.get("sliding_window", 4096) if windowed else 0)
    found = [i for i in range(config.num_layers) if config.sliding_window and i not in config.full_attention_layers]
    assert found == list(windowed)


@pytest.mark.parametrize(
    ("hf", "words"),
    [
        (LLAMA2 | {"sliding_window": 4096}, "sliding_window 4096 is not supported"),  # its class has no such key
        (LLAMA2 | {"layer_types": ["sliding_attention"] * 32}, "layer_types: expected full_attention for every layer"),
        (WINDOWED | {"layer_types": ["full_attention"] * 23}, r"sliding_attention for every layer \(24\), got"),
        (WINDOWED | {"layer_types": ["chunked_attention"] * 24}, "layer_types: expected full_attention or sliding"),
        (WINDOWED | {"layer_types": "full_attention"}, "layer_types: expected .*, got 'full_attention'"),
        (QWEN2 | {"layer_types": ALTERNATING}, "layer_types has sliding_attention, and sliding_window is null or not"),
        (WINDOWED | {"sliding_window": 0}, "sliding_window: expected an integer in 1"),
        (WINDOWED | {"max_window_layers": -1}, "max_window_layers: expected an integer in 0"),
    ],
)
def test_windows_that_make_no_sense_are_named(hf: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        from_hf(hf, {})
