"""docs/models.md lists the families that the code has, and no other."""

import re

from support.places import ROOT

from nanoflow_backend.models.registry import ARCHITECTURES
from nanoflow_backend.models.rope_json import SCALINGS


def test_a_model_is_one_short_file():
    files = list((ROOT / "nanoflow_backend" / "models" / "families").glob("*.py"))
    assert len(files) == 1 + len(ARCHITECTURES)
    long = {path.name: lines for path in files if (lines := len(path.read_text().splitlines())) > 60}
    assert not long


def test_the_table_is_the_registry():
    page = (ROOT / "docs" / "models.md").read_text()
    classes = re.findall(r"^\|[^|]*\| `(\w+)` \|", page, re.M)
    assert classes == [architecture.hf_class for architecture in ARCHITECTURES.values()]
    (scalings,) = re.findall(r"transformers 5\) may be (.*?)\. With", page, re.S)
    assert set(re.findall(r"`(\w+)`", scalings)) == set(SCALINGS) - {"default"}
