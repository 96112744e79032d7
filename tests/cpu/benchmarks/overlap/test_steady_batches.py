"""The model of steady batches is that of the profile, in its precision."""

from pathlib import Path

import pytest
from msgspec.structs import replace
from nanoflow_search.profile.data import Profile, ProfileHeader
from support.simulated.overlap_machine import MODEL

from benchmarks.overlap.steady_batches import profiled_config
from nanoflow_backend.config.precision import BFLOAT16, Precision
from nanoflow_backend.config.quantization import AT_LOAD, FP8, Quantization
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.schedule.file import fingerprint

FP8_KV = Precision(weights="bfloat16", activations="bfloat16", kv=FP8)


@pytest.mark.parametrize("precision", [BFLOAT16, FP8_KV], ids=["bf16 pages", "fp8 pages"])
@pytest.mark.parametrize("quantization", [None, AT_LOAD], ids=["bf16 products", "fp8 products"])
def test_a_profile_says_whether_products_and_pages_are_in_fp8(
    quantization: Quantization | None, precision: Precision, tmp_path: Path
) -> None:
    config = replace(read_model_config(MODEL), quantization=quantization, scaled_kv=precision is FP8_KV)
    header = ProfileHeader(
        model_fingerprint=fingerprint(build(config).layer),
        precision=precision,
        device="a device",
        device_sms=132,
        tensor_parallel=1,
        static_w=185.0,
        power_cap_w=700.0,
    )
    path = tmp_path / "profile.json"
    Profile(header=header).save(path)
    assert profiled_config(MODEL, path) == config
