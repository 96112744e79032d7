"""Tables of what collectives take: reading, lines between sizes, SMs, rates, and what is refused."""

import json
from pathlib import Path

import pytest
from support.places import ROOT

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.network_table import NetworkHeader, NetworkTable

NCCL = ROOT / "benchmarks" / "networks" / "nccl_h200_tp8.json"
LAYER_BYTES = 8192 * 2  # of a token in one all-reduce of Llama-3-70B
HEADER = NetworkHeader(name="assumed", device="any", ranks=8, source="a test")


def row(collective="all_reduce", size=1000, sms=8, us=10.0, **others):
    return {"collective": collective, "bytes": size, "sms": sms, "us": us} | others


def written(tmp_path: Path, *rows, **header) -> Path:
    path = tmp_path / "network.json"
    head = {"name": "assumed", "device": "any", "ranks": 8, "source": "a test"} | header
    path.write_text(json.dumps({"header": head, "times": rows}))
    return path


def test_two_all_reduces_of_a_layer_take_what_nccl_took():
    table = NetworkTable.load(NCCL)
    for tokens, layer_ms in ((2048, 0.420), (4096, 0.734)):
        us, sms = table.time("all_reduce", tokens * LAYER_BYTES)
        assert 2 * us == pytest.approx(1e3 * layer_ms)
        assert sms == 24
    between = table.time("all_reduce", 3072 * LAYER_BYTES).us
    assert between == pytest.approx((210 + 367) / 2)
    assert table.time("all_reduce", 1024 * LAYER_BYTES).us == pytest.approx(210 - (367 - 210) / 2), "on the same line"
    assert table.time("all_reduce", 8192 * LAYER_BYTES).us == pytest.approx(367 + 2 * (367 - 210))


def test_halves_of_an_all_reduce_take_half_of_it_unless_they_were_measured(tmp_path):
    sums = [row(), row(size=2000, us=18.0)]
    assert NetworkTable.load(written(tmp_path, *sums)).time("all_gather", 1500).us == 7
    gathers = [row("all_gather", us=3.0), row("all_gather", size=2000, us=5.0)]
    measured = NetworkTable.load(written(tmp_path, *sums, *gathers))
    assert [measured.time(form, 1500).us for form in ("all_reduce", "reduce_scatter", "all_gather")] == [14, 7, 4]


def test_the_most_sms_that_are_allowed_count(tmp_path):
    table = NetworkTable.load(
        written(tmp_path, *(row(size=size, sms=sms, us=size / sms) for size in (100, 900) for sms in (4, 16)))
    )
    taken = {num_sms: table.time("all_reduce", 480, num_sms) for num_sms in (None, 132, 16, 15, 4, 2)}
    assert {num_sms: sms for num_sms, (_, sms) in taken.items()} == {None: 16, 132: 16, 16: 16, 15: 4, 4: 4, 2: 4}
    assert all(us == pytest.approx(480 / sms) for us, sms in taken.values())


@pytest.mark.parametrize("gb_per_s", [150, 250, 350])
def test_a_rate_is_that_of_the_bytes_that_a_rank_sends(gb_per_s):
    table = NetworkTable.at_rate(HEADER, sms=8, gb_per_s=gb_per_s)
    size = 4096 * LAYER_BYTES
    us, sms = table.time("all_reduce", size)
    assert us == pytest.approx(2 * 7 / 8 * size / (gb_per_s * 1e9) * 1e6)
    assert sms == 8
    assert table.time("reduce_scatter", size).us == pytest.approx(us / 2)
    assert table.time("all_gather", size // 1024).us == pytest.approx(us / 2048)


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        ([row()], {}, "all_reduce on 8 SMs: expected two sizes or more, got 1"),
        ([row(), row(sms=4, size=9)], {}, "expected two sizes"),
        ([row(), row(size=2000, us=9.0)], {}, "expected times that grow with sizes, got 10.0 us for 1000 bytes and 9"),
        ([row(), row(us=20.0)], {}, "grow with sizes"),
        ([row(), row(size=2000, us=30.0)], {}, "below 0 for no bytes; add a smaller size"),
        ([row("all_gather"), row("all_gather", size=2000, us=11.0)], {}, "expected those of all_reduce at least"),
        ([], {}, "expected those of all_reduce"),
        ([row("broadcast")], {}, "Invalid enum value 'broadcast'"),
        ([row(us=0.0)], {}, "> 0"),
        ([row(msgs=1)], {}, "unknown field `msgs`"),
        ([row()], {"ranks": 1}, "ranks"),
        ([row()], {"format_version": 7}, "format version 7, this release reads 1"),
        ([row(), row(size=2000, us=11.0)], {"rank_skew": [0.2, 0.1]}, "rank_skew: expected low and high, got"),
    ],
)
def test_what_is_wrong_with_a_table_is_named(tmp_path, rows, header, message):
    path = written(tmp_path, *rows, **header)
    with pytest.raises(ConfigError) as refused:
        NetworkTable.load(path)
    assert str(path) in str(refused.value)
    assert message in str(refused.value)
