"""Dashboard and alerts: well-formed, and of nothing but metrics that the code has."""

import re
import shutil
import subprocess

import promql_parser
import pytest
from support.telemetry import observability

from nanoflow_backend.telemetry.families import FAMILIES

EXPRESSIONS = observability.expressions()
SUFFIXES = ("_bucket", "_sum", "_count")


def known():
    """Every series name, with the labels that it may be asked for."""
    own = {"model", "version", "instance", "job"}
    for family in FAMILIES:
        if family.kind == "histogram":
            for suffix in SUFFIXES:
                yield family.name + suffix, own | ({"le"} if suffix == "_bucket" else set())
        else:
            yield family.name, own | set(family.labels)


@pytest.mark.parametrize("title", EXPRESSIONS)
def test_an_expression_is_promql_of_metrics_that_exist(title):
    expression = EXPRESSIONS[title]
    promql_parser.parse(expression)
    labels = dict(known())
    names = observability.series_names(expression)
    assert names <= labels.keys()
    allowed = set().union(*(labels[name] for name in names))
    selected = {label for group in re.findall(r"{(.*?)}", expression) for label in re.findall(r"(\w+)\s*[=!]~?", group)}
    grouped = {label for group in re.findall(r"\b(?:by|without) \((.*?)\)", expression) for label in group.split(", ")}
    assert selected | grouped <= allowed


def test_every_metric_but_those_for_others_is_on_the_dashboard():
    shown = set().union(*(observability.series_names(expression) for expression in EXPRESSIONS.values()))
    families = {re.sub("(_bucket|_sum|_count)$", "", name) for name in shown}
    assert {family.name for family in FAMILIES} - families == {"nv_trt_llm_kv_cache_block_metrics"}


def test_the_dashboard_is_one_that_grafana_loads():
    dashboard = observability.dashboard()
    assert {"uid", "title", "schemaVersion", "templating", "panels", "time"} <= dashboard.keys()
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    ids, taken = [], set()
    for panel in dashboard["panels"]:
        ids.append(panel["id"])
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert all(x < 24 for x, _ in cells), panel["title"]
        assert not cells & taken, f"{panel['title']} lies on another panel"
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["description"], panel["title"]
        for target in panel["targets"]:
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert set(re.findall(r"\$(?!__)(\w+)", target["expr"])) <= variables
    assert len(set(ids)) == len(ids)


def test_every_alert_says_how_bad_and_what():
    alerts = observability.alerts()
    assert len({alert["alert"] for alert in alerts}) == len(alerts)
    for alert in alerts:
        assert alert["labels"]["severity"] in ("warning", "critical")
        assert alert["annotations"]["summary"]


@pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool (Debian: apt install prometheus)")
@pytest.mark.parametrize(
    "command", ["check config prometheus.yml", "check rules alerts.yml", "test rules alerts_test.yml"]
)
def test_promtool_agrees(command):
    run = subprocess.run(["promtool", *command.split()], cwd=observability.PROMETHEUS, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
