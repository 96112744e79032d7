"""What is told of the results of benchmarks/overlap: their pictures, and their rows of the table."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from support.simulated.overlap_machine import CPU, H200, Machine, map_of

from benchmarks.overlap.picture import main as draw
from benchmarks.tables import result_files
from benchmarks.tables.full_table import groups
from benchmarks.tables.result_row import ResultRow


def test_pictures_name_what_they_show(machine: Machine, run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    small = {
        "ablation": ("--batch", "512/2:512", "--batch", "512/512:512"),
        "sensitivity": map_of((512, 768), (512, 8192)),
    }
    for benchmark, words in small.items():
        output = tmp_path / f"{benchmark}.json"
        found = run(benchmark, output, *words)
        drawn = picture(output)
        if benchmark == "ablation":
            gains = [arm["over_sequential"][0] for cell in found["cells"] for arm in cell["arms"].values()]
            shown = ["512/512", "nano-batch only", "overlap memory", *(f"{gain:.3f}" for gain in gains)]
        else:
            shown = [f"{cell['over_sequential']:.3f}{'*' * cell['memory_full']}" for cell in found["cells"]]
            shown += [f"{cell['attention_sms']} SMs" for cell in found["cells"]]
            assert "predicted" not in drawn
        for text in shown:
            assert f"<!-- {text} -->" in drawn, text

    output = tmp_path / "mixed.json"
    machine.here_is = CPU
    predicted = run("sensitivity", output, *words)["cells"]
    assert "bold" not in picture(output)
    machine.here_is = H200
    cells = run("sensitivity", output, "--tokens", "512", "--context", "512")["cells"]
    drawn = picture(output)
    assert f"<!-- {cells[0]['over_sequential']:.3f} -->" in drawn
    for cell in predicted[1:]:
        assert f"<!-- ({cell['predicted']['gain']:.3f}){'*' * cell['memory_full']} -->" in drawn
    assert "(italics): predicted, not timed; *: KV memory is full; SMs: of attention" in drawn
    assert "bold: beyond" in drawn


def picture(result: Path) -> str:
    output = result.with_suffix(".svg")
    draw(result, output)
    assert ElementTree.parse(output).getroot().tag.endswith("svg")
    return output.read_text().replace("\n", " ")


def rows() -> list[ResultRow]:
    return [row for of_group in groups().values() for row in of_group]


def test_the_full_table_tells_of_both(
    machine: Machine, run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(result_files, "RESULTS", tmp_path)
    run("ablation", tmp_path / "overlap_ablation_m.json", "--batch", "512/2:512", "--batch", "512/512:512")
    output, words = tmp_path / "overlap_sensitivity_m.json", map_of((512, 768), (512, 8192))
    machine.here_is = CPU
    run("sensitivity", output, *words)
    assert len(rows()) == 2, "what is predicted is not measured"
    machine.here_is = H200
    found = run("sensitivity", output, "--tokens", "512", "--tokens", "768", "--context", "8192")
    timed = [cell for cell in found["cells"] if cell["context"] == 8192]
    one, other, where = rows()
    arms = "llama-3-8b: nano-batch only / overlap memory, against sequential"
    assert one[0] == f"A steady batch of 512 tokens at 512/2, {arms}"
    assert other[0] == f"A steady batch of 512 tokens at 512/512, {arms}"
    counted = "2 of 4 steady batches of 512 to 768 tokens, mean contexts of 512 to 8,192"
    assert counted in where[0]
    gains = sorted(cell["over_sequential"] for cell in timed)
    pays = sum(gain > 1 + found["margin_95"] for gain in gains)
    assert where[1].startswith(f"faster in {pays} beyond {found['margin_95']:.1%} (95 %); {gains[0]:.3f}x")
    assert f" to {gains[-1]:.3f}x" in where[1]
    errors = [abs(cell["error"]) for cell in timed]
    assert where[1].endswith(f"off by {median(errors):.1%} (median), at most {max(errors):.1%}")
    assert {row[2] for row in (one, other, where)} == {"NVIDIA H200"}
