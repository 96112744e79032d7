"""Our metrics under the names of others: which are shown, that they say the same, and that their readers find them."""

import json
import re
from collections import Counter

import msgspec
import pytest
from support.places import ROOT
from support.telemetry.page import LABELS, READY, load, stats, text_of
from support.telemetry.readers import READERS

from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.scheduler.observed import Observed
from nanoflow_backend.telemetry.dialects import DIALECTS, chosen, families
from nanoflow_backend.telemetry.families import FAMILIES
from nanoflow_backend.telemetry.metrics import Page
from nanoflow_backend.telemetry.vllm_families import VLLM_FAMILIES

BUSY = load(running=3, waiting=2, used_pages=5), stats(Observed(ended={"stop": 3}))
SAID = {  # of BUSY, by what they look for
    "endpoint picker": {"running": 3, "waiting": 2, "KV use": 0.5, "block size": 4, "blocks": 10},
    "vLLM's router": {"running": 3, "waiting": 2},
    "Triton's load headers": {"kv_cache_utilization": 0.5, "max_token_capacity": 40},
    "KServe": {"vllm:num_requests_running": 3},
    "KEDA": {"vllm:num_requests_waiting": 2},
}


@pytest.mark.parametrize("reader", READERS)
def test_a_reader_finds_what_it_looks_for(reader):
    said = READERS[reader].read(text_of(families([READERS[reader].dialect]), *BUSY))
    expected = SAID.get(reader.partition(",")[0]) or {
        "vllm:num_requests_running": 3,
        "vllm:num_requests_waiting": 2,
        "vllm:kv_cache_usage_perc": 0.5,
        "vllm:request_success_total": 3,
    }
    assert said | expected == said
    assert len(said) == len(expected) or reader == "vLLM's dashboard"


@pytest.mark.parametrize(("reader", "name"), [(reader, name) for reader in READERS for name in READERS[reader].names])
def test_a_reader_misses_every_name_that_is_removed(reader, name):
    shown = families([READERS[reader].dialect])
    without = [family for family in shown if family.name != name]
    assert len(without) == len(shown) - 1
    with pytest.raises(LookupError):
        READERS[reader].read(text_of(without, *BUSY))


@pytest.mark.parametrize("reader", READERS)
def test_a_reader_of_series_needs_their_labels(reader):
    """What tells models apart in a server, and kinds of blocks or requests."""
    renamed = [
        msgspec.structs.replace(family, labels=tuple(f"{label}_" for label in family.labels), scope=("version",))
        for family in families([READERS[reader].dialect])
    ]
    page = text_of(renamed, *BUSY)
    if reader in ("vLLM's router", "KServe", "KEDA"):  # those take whatever has the name: a server of one model
        assert READERS[reader].read(page)
    else:
        with pytest.raises(LookupError):
            READERS[reader].read(page)


def test_two_models_and_two_engines_are_told_apart():
    keys = set()
    for model in ("a", "b"):
        for engine in ("0", "1"):
            labels = {**LABELS, "model": model, "model_name": model, "engine": f"{model}_0_{engine}"}
            page = text_of(families(DIALECTS), *BUSY, labels)
            keys |= {line.rpartition(" ")[0] for line in page.splitlines() if not line.startswith("#")}
    own = [key for key in keys if key.startswith("vllm:num_requests_running")]
    assert len(own) == 4
    assert all(f'model_name="{key[key.index("engine=") + 8]}"' in key for key in own)
    assert len([key for key in keys if key.startswith("vllm:generation_tokens_total")]) == 2, "engines add up"


def test_a_family_of_two_dialects_is_shown_once():
    shown = Counter(family.name for family in families(DIALECTS))
    assert max(shown.values()) == 1
    assert shown.keys() == {family.name for of_one in DIALECTS.values() for family in of_one}
    assert {family.name for family in FAMILIES} & {family.name for family in DIALECTS["trtllm"]}


def test_what_gateways_ask_for_is_live():
    asked = set(READERS["endpoint picker, engine `vllm`"].names) - {"vllm:cache_config_info"}
    asked |= set(READERS["endpoint picker, engine `triton-tensorrt-llm`"].names)
    asked |= {name.replace("vllm:", "nanoflow_") for name in asked if name.startswith("vllm:")}
    assert {family.name for family in families(DIALECTS) if family.live} == asked


def test_vllms_names_have_the_same_values(server, metrics):
    observed = Observed(delivered_tokens=40)
    for value, times in ((0.004, 3), (0.02, 7), (0.3, 1), (200.0, 2)):
        observed.first_token_s.observe(value, times)
        observed.inter_token_s.observe(value, times)
    page = Page(server.create, metrics, VLLM_FAMILIES)
    metrics.take(stats(observed, prefix_query_tokens=9))
    for n in (1, 1, 3, 21):
        metrics.queued(n)
    page.flush()
    assert server.value("vllm:prompt_tokens_total") == 9
    assert server.value("vllm:generation_tokens_total") == 40
    first = {le: server.value("vllm:time_to_first_token_seconds_bucket", f"le={le}") for le in ("0.01", "10", "+Inf")}
    assert first == {"0.01": 3, "10": 11, "+Inf": 13}
    assert server.value("vllm:time_per_output_token_seconds_bucket", "le=0.02") == 10
    assert server.value("vllm:time_per_output_token_seconds_count") == 13
    assert server.value("vllm:request_params_n_bucket", "le=2") == 2
    assert server.value("vllm:request_params_n_bucket", "le=5") == 3
    assert (server.value("vllm:request_params_n_count"), server.value("vllm:request_params_n_sum")) == (4, 26)
    metrics.engine_restarted(READY)
    metrics.queued(1)
    metrics.take(stats(Observed(delivered_tokens=2)))
    page.flush()
    assert server.value("vllm:generation_tokens_total") == 42
    assert server.value("vllm:request_params_n_count") == 5


def test_the_buckets_of_vllms_names_are_few_and_exist(server, metrics):
    """Of more than 13 series of a name the server does not list the first one last."""
    Page(server.create, metrics, VLLM_FAMILIES)
    made = Counter(name for name, *_ in server.series)
    assert max(made.values()) <= 13
    for family in VLLM_FAMILIES:
        assert family.bounds is None or set(family.bounds) <= set(family.read(metrics.view()).bounds), family.name


@pytest.mark.parametrize(
    ("said", "model_json", "dialects", "expected"),
    [
        (None, None, None, ["nanoflow", "vllm"]),
        (None, {}, None, ["nanoflow", "vllm"]),
        ("false", {}, None, ["nanoflow"]),
        ("No", None, ["vllm", "trtllm"], ["trtllm"]),
        ("true", None, ["nanoflow"], ["nanoflow", "vllm"]),
        ("yes", None, "trtllm", ["trtllm", "vllm"]),
        (None, None, "vllm, trtllm", ["trtllm", "vllm"]),
        (None, None, [], []),
        ("True", {"disable_log_stats": False}, None, ["nanoflow", "vllm"]),
        ("true", {"disable_log_stats": True}, None, ["nanoflow"]),
        (None, {"disable_log_stats": "true"}, None, ["nanoflow"]),
    ],
)
def test_dialects_are_chosen_by_one_setting_and_the_switches_of_vllms_backend(
    tmp_path, said, model_json, dialects, expected
):
    file = "engine.json" if model_json is None else "model.json"
    (tmp_path / file).write_text(json.dumps({"model": "m", **(model_json or {})}))
    fields = {"model": "m"} if dialects is None else {"model": "m", "metrics_dialects": dialects}
    config = EngineConfig.resolve(fields, relative_to=tmp_path)
    model_config = {"parameters": {} if said is None else {"REPORT_CUSTOM_METRICS": {"string_value": said}}}
    assert chosen(config, model_config, tmp_path) == expected


@pytest.mark.parametrize(
    ("dialects", "wrong"), [("vllm,prometheus", "prometheus"), (["vllm", "vllm"], "different ones"), (3, "3|int")]
)
def test_dialects_that_nobody_speaks_are_named(tmp_path, dialects, wrong):
    with pytest.raises(ConfigError, match=f"metrics_dialects.*{wrong}|{wrong}.*metrics_dialects"):
        EngineConfig.resolve({"model": "m", "metrics_dialects": dialects}, relative_to=tmp_path)


def test_a_switch_that_is_neither_on_nor_off_is_named(tmp_path):
    (tmp_path / "engine.json").write_text("{}")
    config = {"parameters": {"REPORT_CUSTOM_METRICS": {"string_value": "1"}}}
    with pytest.raises(ConfigError, match="REPORT_CUSTOM_METRICS: expected true or false, got '1'"):
        chosen(EngineConfig(model="m"), config, tmp_path)


def test_a_cache_of_another_size_takes_the_place_of_the_last(server, metrics):
    page = Page(server.create, metrics, VLLM_FAMILIES)
    metrics.engine_restarted(msgspec.structs.replace(READY, num_pages=12))
    page.flush()
    assert server.value("vllm:cache_config_info", "block_size=4", "num_gpu_blocks=10") == 0
    assert server.value("vllm:cache_config_info", "block_size=4", "num_gpu_blocks=12") == 1


def test_the_documentation_says_which_is_which():
    rows = re.findall(r"^\| `(vllm:\w+)` \| (\S+)", (ROOT / "docs" / "metrics.md").read_text(), re.M)
    ours = {id(family.read): f"`{family.name}`" for family in FAMILIES}
    assert rows == [(family.name, ours.get(id(family.read), "none:")) for family in VLLM_FAMILIES]


def test_the_documentation_says_who_reads_what():
    page = (ROOT / "docs" / "metrics.md").read_text()
    (table,) = re.findall(r"^\| who reads .*?(?=\n\n)", page, re.M | re.S)
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:]]
    told = {who: (dialect.strip("`"), tuple(re.findall(r"`([\w:]+)`", names))) for who, dialect, names in rows}
    assert told == {who: (reader.dialect, reader.names) for who, reader in READERS.items()}
