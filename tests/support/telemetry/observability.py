"""The PromQL expressions of the dashboard and of the alerts, and the series that they name."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml
from support.places import ROOT

DOCKER = ROOT / "docker"
DASHBOARD = DOCKER / "grafana" / "dashboards" / "nanoflow.json"
PROMETHEUS = DOCKER / "prometheus"


def dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text())


def alerts() -> list[dict[str, Any]]:
    return [
        rule for group in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"] for rule in group["rules"]
    ]


def expressions() -> dict[str, str]:
    """By the title of a panel and the letter of a query, or by the name of an alert; Grafana's variables filled in."""
    queries = {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in dashboard()["panels"]
        for target in panel.get("targets", ())
    }
    filled = {
        title: re.sub(r"\$__(rate_interval|range)", "5m", expression).replace("$model", ".*")
        for title, expression in queries.items()
    }
    return {**filled, **{rule["alert"]: rule["expr"] for rule in alerts()}}


def series_names(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:nanoflow|nv)_\w+", expression))
