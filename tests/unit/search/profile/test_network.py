"""A network's table in a profile: points and pairs by hand, and which tables do not go together."""

import pytest
from msgspec.structs import replace
from nanoflow_search.checkpoint import SearchError
from nanoflow_search.cost.devices import DEVICES
from nanoflow_search.cost.work import operation_work
from nanoflow_search.cost.workload import Mix
from nanoflow_search.hardware.machine import find_machine
from nanoflow_search.hardware.synthetic import SyntheticDevice
from nanoflow_search.profile.data import Profile
from nanoflow_search.profile.load import Load, LoadsToMeasure, SoloLoad
from nanoflow_search.profile.network import check_sms, check_tables, network_sms, with_network
from nanoflow_search.profile.points import partition_loads
from nanoflow_search.request import SearchRequest
from support.places import ROOT
from support.simulated.profiles import profiled

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.network_table import NetworkHeader, NetworkTable
from nanoflow_backend.graph.operation import Resource
from nanoflow_backend.runtime import device as devices

REQUEST = SearchRequest.of(ROOT / "benchmarks" / "models" / "llama-3-70b", 8, ("1024/512",))
NCCL = NetworkTable.load(ROOT / "benchmarks" / "networks" / "nccl_h200_tp8.json")
COPIES = NetworkTable.load(ROOT / "benchmarks" / "networks" / "copy_8_sms_h200_tp8.json")
MIX = Mix(683, 1365, 1280, 512)
ROW = 8192 * 2  # bytes of a token's hidden state


@pytest.fixture(scope="module")
def profile() -> Profile:
    """A product, a norm and decodes, with both tables."""
    device = SyntheticDevice(REQUEST.operations, DEVICES["H200-sustained"], ranks=8, noise=0.0)
    loads = [Load("gate_up", 2048), Load("mlp_norm", 2048), Load("attention/decode", 683 * 1280.0)]
    alone = profiled(device, REQUEST.operations, LoadsToMeasure(tuple(SoloLoad(load) for load in loads), ()))
    alone = replace(alone, header=replace(alone.header, tensor_parallel=8))
    return with_network(alone, REQUEST.operations, [NCCL, COPIES], MIX, [2048])


def test_collectives_take_what_the_tables_say(profile: Profile) -> None:
    reduce = profile.surface("mlp_reduce")
    assert reduce.shares == (8, 24)
    assert reduce.duration_us(2048, None) == pytest.approx(210), "as NCCL took, where there is no limit"
    assert reduce.duration_us(2048, 8) == pytest.approx(2 * 7 / 8 * 2048 * ROW / 250e3)
    for part in ("mlp_reduce.reduce_scatter", "mlp_reduce.all_gather", "attention_reduce.gather_input"):
        assert profile.surface(part).duration_us(2048, 8) == pytest.approx(7 / 8 * 2048 * ROW / 250e3)
        assert profile.surface(part).duration_us(2048, 24) == pytest.approx(105), "half of an all-reduce"
    # A rank's 256 rows of the residual are read and written too, by 8 SMs at 8 / 33 of 4.49 TB/s.
    own_us = 1e6 * 2 * 256 * ROW / (4.49e12 * 8 / 33)
    normed = profile.surface("mlp_reduce.normed").duration_us(2048, 8)
    assert normed == pytest.approx(reduce.duration_us(2048, 8) + own_us)
    sent = 2 * 7 / 8 * 2048 * ROW
    assert reduce.dynamic_j(2048, 8) == pytest.approx(sent * 320e-12 + 2 * 2048 * ROW * 90e-12)


def test_beside_collectives_only_memory_is_short(profile: Profile) -> None:
    effects = {(p.first, p.second, p.second_sms): p for p in profile.pairs}
    networks = [op.name for op in REQUEST.operations.operations if op.resource is Resource.NETWORK]
    assert {key[1] for key in effects} == set(networks)
    assert {key[0] for key in effects} == {"gate_up", "mlp_norm", "attention/decode"}
    product, norm = effects["gate_up", "mlp_reduce", 8], effects["mlp_norm", "mlp_reduce", 8]
    assert (product.first_slowdown, product.second_slowdown, product.first_sms) == (1, 1, 124)
    # By the law the norm reads and writes at 4.49 TB/s but for its launch, and the copies at twice their rate.
    point = next(p for p in profile.points if p.operation == "mlp_norm")
    asked = 4 * 2048 * ROW / (point.duration_us * 1e-6)
    assert norm.first_slowdown == pytest.approx((asked + 2 * 250e9) / 4.49e12)
    assert 1 < norm.first_slowdown < effects["attention/decode", "mlp_reduce", 8].first_slowdown < 1.15


def test_kernels_of_the_network_send_what_their_parts_do() -> None:
    graph, mix = REQUEST.operations, Mix(0, 2048, 0, 512)
    whole = operation_work(graph, graph["mlp_reduce"], mix, 8)
    halves = [operation_work(graph, graph[f"mlp_reduce.{part}"], mix, 8) for part in ("reduce_scatter", "all_gather")]
    assert whole.network_bytes == 2 * 7 / 8 * 2048 * ROW == sum(half.network_bytes for half in halves)
    normed = operation_work(graph, graph["mlp_reduce.normed"], mix, 8)
    assert normed.network_bytes == whole.network_bytes
    assert normed.memory_bytes - whole.memory_bytes == 2 * 256 * ROW


def test_tables_that_do_not_fit_are_refused() -> None:
    assert network_sms([NCCL, COPIES]) == (8, 24)
    check_tables([NCCL, COPIES], 8)
    check_tables([], 1)
    with pytest.raises(ConfigError, match=r"network: expected a table of 4 ranks, got 'NCCL' of 8"):
        check_tables([NCCL], 4)
    with pytest.raises(ConfigError, match=r"network: expected a table where several ranks share the model \(--tp\)"):
        check_tables([NCCL], 1)
    twice = NetworkTable.at_rate(NetworkHeader(name="others", device="any", ranks=8, source="a test"), 8, 150.0)
    with pytest.raises(ConfigError, match=r"both 'copies on 8 SMs.*' and 'others' have times of all_reduce on 8 SMs"):
        check_tables([COPIES, twice], 8)


def test_a_table_leaves_half_of_the_sms_to_what_runs_beside_collectives(profile: Profile) -> None:
    wide = replace(NCCL, times=tuple(replace(time, sms=132) for time in NCCL.times))
    with pytest.raises(
        ConfigError, match=r"network: 'NCCL' has times on 132 SMs: expected at most 66, half of the 132 of the device"
    ):
        with_network(profile, REQUEST.operations, [COPIES, wide], MIX, [2048])
    check_sms([COPIES, replace(NCCL, times=tuple(replace(time, sms=66) for time in NCCL.times))], 132)


def test_one_gpu_measures_no_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "find_device", lambda _: devices.Device("cuda", "NVIDIA H200", 132))
    with pytest.raises(SearchError, match="tp: collectives of 8 ranks cannot be measured here: expected --network"):
        find_machine("auto", 8)
    machine = find_machine("auto", 8, has_table=True)
    assert machine is not None
    with pytest.raises(SearchError, match="tp: plans of 8 ranks cannot be timed on one GPU"):
        machine.timer(REQUEST, MIX)


def test_what_is_measured_leaves_sms_to_the_network() -> None:
    loads = partition_loads(REQUEST.operations, 132, MIX, 2048, (8, 12, 16), (8, 24))
    assert {a.load.sms for a in loads.alone if a.load.operation == "down"} == {None, 124, 116, 112, 108}
    assert {a.load.sms for a in loads.alone if a.load.operation == "mlp_reduce.normed"} == {None, 8, 24}
    beside = {(a.operation, b.operation) for a, b in loads.together if b.sms == 8 and a.sms == 124}
    assert {
        ("down", "mlp_reduce"),
        ("attention/decode", "attention_reduce.normed"),
        ("o.columns", "mlp_reduce"),
    } < beside
    names = {load.load.operation for load in loads.alone}
    assert {"o", "o.columns", "attention_reduce.gather_input", "mlp_reduce.reduce_scatter"} < names
