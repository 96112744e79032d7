"""The timing model: what operations take on ranges of rows."""

import pytest
from nanoflow_search.cost.workload import Mix
from nanoflow_search.predict.timing_model import TimingModel
from nanoflow_search.profile.load import ProfileError
from support.places import LLAMA_3_8B

from benchmarks.paper import a100_tables as a100
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build

MODEL_8B = build(read_model_config(LLAMA_3_8B))
PROFILE_8B = a100.profile(MODEL_8B.layer, 1, a100.LLAMA_3_8B)


def test_attention_takes_what_its_tokens_need() -> None:
    """The first tokens of a batch decode, over their contexts; the others are of prompts."""
    measured = TimingModel(PROFILE_8B, Mix(400, 624, 1024.0, 1024.0))
    decode, prefill = 997 / 384, 63 / 640
    assert measured.operations_us(("attention",), 0, 400) == pytest.approx(400 * decode)
    assert measured.operations_us(("attention",), 300, 500) == pytest.approx(100 * decode + 100 * prefill)
    assert measured.operations_us(("attention",), 400, 1024) == pytest.approx(624 * prefill)
    longer = TimingModel(PROFILE_8B, Mix(400, 624, 2048.0, 1024.0))
    assert longer.operations_us(("attention",), 0, 400) == pytest.approx(800 * decode)
    assert measured.operations_us(("attention_norm", "qkv"), 0, 384) == pytest.approx(84)
    with pytest.raises(ProfileError, match="router was not measured"):
        measured.operations_us(("router",), 0, 1)
