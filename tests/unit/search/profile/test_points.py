"""Which loads a profile is to hold."""

from msgspec.structs import replace
from nanoflow_search.cost.workload import Mix
from nanoflow_search.profile.points import attention_sms, attention_sms_for, partition_loads
from support.places import LLAMA_3_8B

from nanoflow_backend.config.precision import Precision
from nanoflow_backend.config.quantization import AT_LOAD, FP8
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build

LAYER = build(read_model_config(LLAMA_3_8B)).layer
MIX = Mix(704, 1344, 1280, 512)


def test_what_is_measured_is_what_partitions_run() -> None:
    loads = partition_loads(LAYER, 132, MIX)
    assert len(loads.alone) + sum(anchor.two_clocks for anchor in loads.alone) + len(loads.together) <= 215
    assert len({anchor.load for anchor in loads.alone}) == len(loads.alone)
    for first, second in loads.together:
        assert (first.sms or 0) + (second.sms or 0) == 132
        assert second.operation.startswith("attention/")
    assert {a.load.sms for a in loads.alone if a.load.operation == "down"} == {None, 96, 100, 104, 108}
    decodes_only = partition_loads(LAYER, 132, Mix(512, 0, 1024, 0))
    assert not any("prefill" in a.load.operation for a in decodes_only.alone)
    assert not any("prefill" in load.operation for pair in decodes_only.together for load in pair)


def test_all_that_is_planned_for_has_its_shares_but_a_profile_stays_within_250_measurements() -> None:
    more, less = Mix(1000, 280, 8000, 512), Mix(325, 1723, 1268, 580)  # (32, 36, 40, 44) and (8, 12, 16, 20)
    assert attention_sms_for(LAYER, 132, [MIX, MIX]) == (24, 28, 32, 36)
    shares = attention_sms_for(LAYER, 132, [MIX, more])
    assert shares == (28, 32, 36, 40, 44)  # of 24 to 44
    loads = partition_loads(LAYER, 132, MIX, 2048, shares)
    assert len(loads.alone) + sum(anchor.two_clocks for anchor in loads.alone) + len(loads.together) <= 250
    assert attention_sms_for(LAYER, 132, [less, MIX, more]) == (20, 24, 28, 32, 36)


def test_attentions_share_follows_what_it_reads_beside_what_products_compute() -> None:
    """By hand: 704 x 1280 tokens of 4 KiB, 70 operations a byte, beside 2048 x 436 MFLOP of products: 30 of 132 SMs."""
    assert attention_sms(LAYER, 132, MIX) == (24, 28, 32, 36)
    assert attention_sms(LAYER, 132, Mix(325, 1723, 1268, 580)) == (8, 12, 16, 20)
    assert attention_sms(LAYER, 132, Mix(1, 2047, 16, 512))[0] == 4
    assert attention_sms(LAYER, 132, Mix(1000, 280, 8000, 512)) == (32, 36, 40, 44)
    assert attention_sms(LAYER, 16, Mix(704, 1344, 100_000, 512)) == (4, 8, 12)


def test_in_fp8_products_are_faster_and_pages_half_as_large() -> None:
    """By hand: 704 x 1280 tokens of 2 KiB beside products that take 0.529 of the time: 0.95 of the share in 16 bits."""
    config = read_model_config(LLAMA_3_8B)
    precision = Precision(weights="bfloat16", activations="bfloat16", kv=FP8)
    in_fp8 = build(replace(config, quantization=AT_LOAD, scaled_kv=True)).layer
    assert attention_sms(in_fp8, 132, MIX, precision) == (24, 28, 32, 36) == attention_sms(LAYER, 132, MIX)
    assert attention_sms(LAYER, 132, MIX, precision) == (12, 16, 20, 24), "with pages alone in FP8"
    assert attention_sms_for(in_fp8, 132, [MIX], precision) == (24, 28, 32, 36)
    names = {anchor.load.operation for anchor in partition_loads(in_fp8, 132, MIX).alone}
    assert {"attention_quantise", "gate_up_quantise"} < names
