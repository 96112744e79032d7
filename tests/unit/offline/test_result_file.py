"""ResultFile: whose file it is, what it goes on with, and what it leaves as it is."""

import fcntl
import json
import os

import pytest
from msgspec.structs import replace
from support.commands.json_lines import read_lines, write_lines
from support.runtime.arithmetic_runner import MADE_WITH, ArithmeticRunner

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.offline.job_file import JobFile
from nanoflow_backend.offline.result_file import ResultFile
from nanoflow_backend.offline.run import run_jobs

LINES = [{"prompt": f"page {number}", "id": f"p{number}"} for number in range(9)]


@pytest.fixture
def source(tmp_path):
    return write_lines(tmp_path / "in.jsonl", LINES)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out.jsonl"


def complete(source, output, made_with=MADE_WITH):
    with ResultFile(output, source) as results:
        for _ in run_jobs(results.resume(JobFile(source).lines(), made_with), ArithmeticRunner(), results):
            pass
    return results


def refused(source, output, made_with=MADE_WITH):
    """The message; the output and its record are as they were."""
    record = output.with_name(output.name + ".run")
    before = [path.read_bytes() if path.exists() else None for path in (output, record)]
    with pytest.raises(ConfigError) as error:
        complete(source, output, made_with)
    assert before == [path.read_bytes() if path.exists() else None for path in (output, record)]
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("content", [b"my notes", b"my notes\n", b'{"id": "p0"', b'{"id": "p0", "text": ""}\n', b"\0"])
def test_a_file_that_is_not_ours_is_left_untouched(source, output, content):
    output.write_bytes(content)
    assert "out.jsonl: expected an empty file or the output of a batch" in refused(source, output)


@pytest.mark.parametrize("content", [b"my notes", b"my notes\n", b'{"id":"p4","te', b'{"id":"p3"}\n', b"\0\0"])
def test_what_others_appended_to_our_output_is_left_untouched(source, output, content):
    complete(write_lines(source, LINES[:3]), output)
    with output.open("ab") as file:
        file.write(content)
    assert "input's line 4 (id 'p3')" in refused(write_lines(source, LINES), output)


@pytest.mark.parametrize("part", [1, 3, 11, 12, 40])
def test_what_a_kill_left_in_part_is_done_again(source, output, part):
    complete(source, output)
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:4]) + lines[4][:part])
    assert complete(source, output).lines == 9
    assert output.read_bytes() == whole


def test_a_last_line_without_its_newline_is_done_again(source, output):
    complete(source, output)
    whole = output.read_bytes()
    output.write_bytes(whole[:-1])
    complete(source, output)
    assert output.read_bytes() == whole


def test_a_changed_line_is_named_by_its_place_in_the_input(source, output):
    complete(source, output)
    changed = [dict(line) for line in LINES]
    changed[5]["temperature"] = 0.5
    write_lines(source, [b"", *changed])
    message = refused(source, output)
    assert "line 6 is the result of another line than the input's line 7 (id 'p5'), which has changed since" in message


def test_lines_that_have_no_result_yet_may_change(source, output):
    complete(write_lines(source, LINES[:4]), output)
    with output.open("r+b") as file:  # as a kill after two results: four lines were read
        file.truncate(sum(map(len, output.read_bytes().splitlines(keepends=True)[:2])))
    write_lines(source, [*LINES[:2], {"prompt": "new", "id": "p2"}, *LINES[3:]])
    assert complete(source, output).lines == 9
    assert read_lines(output)[2]["text"] == "wen"
    assert complete(source, output).lines == 9, "the record is that of the new lines"


def test_an_input_that_grew_is_gone_on_with(source, output):
    complete(write_lines(source, LINES[:4]), output)
    before = output.read_bytes()
    complete(write_lines(source, LINES), output)
    assert output.read_bytes().startswith(before)
    assert [line["id"] for line in read_lines(output)] == [f"p{number}" for number in range(9)]


def test_an_input_that_shrank_is_refused(source, output):
    complete(source, output)
    assert "out.jsonl: has more lines than the input" in refused(write_lines(source, LINES[:4]), output)


@pytest.mark.parametrize(
    ("made_with", "message"),
    [
        (replace(MADE_WITH, settings={"dtype": "bfloat16", "seed": 0}), "dtype was 'float32', is 'bfloat16'"),
        (replace(MADE_WITH, model={**MADE_WITH.model, "config.json": "x"}), "the model's config.json has changed"),
        (replace(MADE_WITH, nanoflow_batch=2), "out.jsonl.run: format 1, expected 2"),
    ],
)
def test_another_model_or_setting_is_named(source, output, made_with, message):
    complete(source, output)
    assert message in refused(source, output, made_with)


def test_a_record_without_some_results_is_refused(source, output, tmp_path):
    complete(source, output)
    record = tmp_path / "out.jsonl.run"
    record.write_bytes(b"".join(record.read_bytes().splitlines(keepends=True)[:4]))
    assert "line 4 is not the result of the input's line 4" in refused(source, output)
    record.write_text("mine\n")
    assert "out.jsonl.run: is no record of a batch" in refused(source, output)


def test_a_file_in_the_record_s_place_is_left_untouched(source, output, tmp_path):
    (tmp_path / "out.jsonl.run").write_text("mine\n")
    with pytest.raises(ConfigError, match=r"out\.jsonl\.run: is no record of a batch"):
        complete(source, output)
    assert (tmp_path / "out.jsonl.run").read_text() == "mine\n"


@pytest.mark.parametrize("left", [b"", b'{"nano', b'{"nanoflow_batch":1,"sett'])
def test_a_record_that_a_kill_left_in_part_is_written_again(source, output, tmp_path, left):
    (tmp_path / "out.jsonl.run").write_bytes(left)
    assert complete(source, output).lines == 9


def test_two_runs_of_one_output_are_kept_apart(source, output, tmp_path):
    link = tmp_path / "link.jsonl"
    link.symlink_to(output)
    with ResultFile(output, source) as results:
        results.resume(iter(()), MADE_WITH)
        for name in (output, link):
            with pytest.raises(ConfigError, match="jsonl: expected a file that no other run is writing"):
                ResultFile(name, source)
    assert complete(source, link).lines == 9, "the lock ends with the run"


def test_the_input_is_never_the_output(source, tmp_path):
    link = tmp_path / "link.jsonl"
    link.hardlink_to(source)
    for output in (source, link):
        with pytest.raises(ConfigError, match=r"jsonl: expected another file than the input"):
            ResultFile(output, source)
    assert read_lines(source) == LINES


def test_what_is_no_regular_file_is_refused(source, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/full", "/dev/null"):
        with pytest.raises(ConfigError, match="expected a regular file"):
            ResultFile(tmp_path / path, source)
    with pytest.raises(ConfigError, match=r"nowhere/out\.jsonl: No such file or directory"):
        ResultFile(tmp_path / "nowhere" / "out.jsonl", source)


def test_results_hold_nothing_but_results(source, output):
    complete(source, output)
    assert [list(line) for line in read_lines(output)] == [
        ["id", "text", "token_ids", "finish_reason", "num_input_tokens", "num_output_tokens"]
    ] * 9
    header, *digests = output.with_name("out.jsonl.run").read_text().splitlines()
    assert json.loads(header)["settings"] == {"dtype": "float32", "seed": 0}
    assert [len(digest) for digest in digests] == [16] * 9
    assert fcntl.flock(os.open(output, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB) is None
