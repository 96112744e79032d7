"""nanoflow batch, on a real engine."""

import os
import shutil
import signal
import subprocess
import time

import pytest
from support.commands.command_line import assert_one_line, run_here, start
from support.commands.json_lines import read_lines, write_lines
from support.process_tree import children
from support.waiting import until

from nanoflow_backend.engine import LLM, SamplingParams
from nanoflow_backend.offline.result_file import ResultFile
from nanoflow_backend.text.tokenizer import Tokenizer


def test_batch_keeps_the_order_and_turns_bad_lines_into_errors(model, tmp_path):
    lines = [
        {"prompt": "The quick brown fox", "max_tokens": 30, "temperature": 0, "id": "long"},
        {"prompt_token_ids": [5, 6, 7], "max_tokens": "3", "temperature": 0},
        b"{not json",
        {"max_tokens": 3},
        {"prompt": "a", "prompt_token_ids": [1]},
        {"prompt": 7},
        {"prompt_token_ids": ["x"]},
        {"prompt_token_ids": [10**6]},
        {"prompt": "a", "temprature": 1},
        {"prompt": "a", "top_p": 2, "id": {"any": "json"}},
        b'{"prompt": "\xff"}',
        b'{"prompt": ' * 20_000,
        {"prompt": "over the lazy dog", "max_tokens": 2, "temperature": 0},
    ]
    output = tmp_path / "out.jsonl"
    done = run_here("batch", "--model", model, "--input", write_lines(tmp_path / "in.jsonl", lines), "--output", output)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "nanoflow: 3 lines done, 10 failed"
    results = read_lines(output)
    assert [r["id"] for r in results] == ["long", 1, 2, 3, 4, 5, 6, 7, 8, {"any": "json"}, 10, 11, 12]
    errors = {r["id"]: r["error"] for r in results[2:9]}
    expected = {
        2: "expected a JSON object",
        3: "expected either prompt or prompt_token_ids",
        4: "expected either prompt or prompt_token_ids",
        5: "prompt: Expected `str`, got `int`",
        6: "prompt_token_ids: Expected `int`, got `str`",
        7: "prompt: expected token ids in 0..",
        8: "temprature: unknown sampling parameter",
    }
    assert errors.keys() == expected.keys()
    for number, message in expected.items():
        assert message in errors[number]
    assert "top_p: expected a number in (0, 1]" in results[9]["error"]
    assert "'utf-8' codec can't decode byte 0xff" in results[10]["error"]
    assert "nested too deeply" in results[11]["error"]
    llm = LLM.from_pretrained(model)
    (alone,) = llm.generate(["The quick brown fox"], SamplingParams(max_tokens=30, temperature=0.0))
    assert results[0] == {
        "id": "long",
        "text": alone.text,
        "token_ids": alone.token_ids,
        "finish_reason": alone.finish_reason,
        "num_input_tokens": alone.num_input_tokens,
        "num_output_tokens": len(alone.token_ids),
    }
    assert (results[1]["num_input_tokens"], results[1]["num_output_tokens"]) == (3, 3)

    again = run_here("batch", "--model", model, "--input", tmp_path / "in.jsonl", "--output", output)
    assert again.returncode == 1, "a run that continues counts the errors of the one before it"
    assert again.stderr.splitlines()[-1] == "nanoflow: 3 lines done, 10 failed"
    assert read_lines(output) == results


def test_a_killed_and_an_interrupted_batch_go_on_where_they_were(model, tmp_path):
    lines = [{"prompt": f"page {number}", "max_tokens": 40, "temperature": number % 2} for number in range(60)]
    source = write_lines(tmp_path / "in.jsonl", lines)
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert run_here("batch", "--model", model, "--input", source, "--output", whole).returncode == 0

    def finished():
        return output.read_bytes().count(b"\n") if output.exists() else 0

    def stopped(sign, after):
        child = start(*arguments, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while finished() < after:
            assert child.poll() is None, "it ended before it could be stopped"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        child.send_signal(sign)
        return child.communicate(timeout=60)[1], child.returncode

    arguments = ("batch", "--model", model, "--input", source, "--output", output, "--set", "dense_batch_tokens=8")
    stopped(signal.SIGKILL, after=3)
    assert 3 <= finished() < len(lines)
    before = output.read_bytes()
    with output.open("ab") as file:
        file.write(b'{"id":%d,"te' % finished())  # what a kill in mid-write leaves
    told, status = stopped(signal.SIGINT, after=finished() + 2)
    assert status == 130
    assert told.splitlines()[-1] == f"nanoflow: {finished()} lines are done; the same command goes on there"
    assert "Traceback" not in told
    done = run_here(*arguments)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "nanoflow: 60 lines done, 0 failed")
    assert output.read_bytes().startswith(before), "finished lines are kept as they are"
    assert read_lines(output) == read_lines(whole), "what is drawn too"


def test_a_batch_whose_rank_is_killed_says_so_in_one_line(model, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "The dog", "max_tokens": 200, "ignore_eos": True}] * 200)
    arguments = ("--model", model, "--input", source, "--output", tmp_path / "out.jsonl", "--set", "tensor_parallel=2")
    child = start("batch", *arguments, "--set", "dense_batch_tokens=8", stderr=subprocess.PIPE)
    until(lambda: children(child.pid))
    (rank,) = children(child.pid)
    os.kill(rank, signal.SIGKILL)
    _, told = child.communicate(timeout=60)
    assert (child.returncode, told.splitlines()[-1]) == (2, f"nanoflow: rank 1: process {rank} ended with SIGKILL")
    assert "Traceback" not in told


def test_logprobs_that_were_asked_for_are_in_the_line(model, tmp_path):
    fields = {"prompt": "The dog", "max_tokens": 3, "temperature": 0}
    lines = [{**fields, "logprobs": 2, "prompt_logprobs": 0}, fields]
    output = tmp_path / "out.jsonl"
    done = run_here("batch", "--model", model, "--input", write_lines(tmp_path / "in.jsonl", lines), "--output", output)
    assert done.returncode == 0, done.stderr
    asked, plain = read_lines(output)
    assert {"logprobs", "prompt_logprobs"} & plain.keys() == set()
    (alone,) = LLM.from_pretrained(model).generate(
        ["The dog"], SamplingParams(max_tokens=3, temperature=0.0, logprobs=2, prompt_logprobs=0)
    )
    tokenizer = Tokenizer.from_pretrained(model)
    prompt = tokenizer.encode("The dog")
    assert asked["prompt_logprobs"][0] is None
    assert [list(entry) for entry in asked["prompt_logprobs"][1:]] == [[str(token)] for token in prompt[1:]]
    assert len(asked["logprobs"]) == 3
    for entry, token, of_engine in zip(asked["logprobs"], alone.token_ids, alone.logprobs, strict=True):
        first, second = entry.items()
        assert first == (
            str(token),
            {
                "logprob": pytest.approx(of_engine.logprobs[0], abs=1e-5),
                "rank": 1,
                "decoded_token": tokenizer.token_text(token),
            },
        )
        assert second[1]["rank"] == 2
        assert second[1]["logprob"] <= first[1]["logprob"]


def test_a_second_run_of_one_output_and_a_changed_setting_are_one_line_each(model, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "a", "max_tokens": 1}, {"prompt": 7}])
    output = tmp_path / "out.jsonl"
    arguments = ("batch", "--model", model, "--input", source, "--output", output)
    with ResultFile(output, source):
        assert_one_line(run_here(*arguments), f"{output}: expected a file that no other run is writing")
    assert run_here(*arguments).returncode == 1
    before = output.read_bytes()
    done = run_here(*arguments, "--set", "seed=1", "--set", "dtype=bfloat16")
    assert_one_line(done, "dtype was 'float32', is 'bfloat16'; seed was 0, is 1. Expected the same again")
    assert output.read_bytes() == before
    again = run_here(*arguments)
    assert (again.returncode, again.stderr) == (1, "nanoflow: 1 lines done, 1 failed\n"), "no engine, no progress bar"


@pytest.mark.parametrize("output", ["/dev/full", "in.jsonl", "no/out.jsonl", "notes.txt"])
def test_an_output_that_cannot_be_is_one_line_and_no_engine_is_loaded(model, tmp_path, output):
    """The model's folder has a config only: an engine would say that its weights are missing."""
    (tmp_path / "model").mkdir()
    shutil.copy(model / "config.json", tmp_path / "model")
    (tmp_path / "notes.txt").write_bytes(b"my notes")
    source, path = write_lines(tmp_path / "in.jsonl", [{"prompt": "a"}]), tmp_path / output
    before = path.read_bytes() if path.is_file() else None
    done = run_here("batch", "--model", tmp_path / "model", "--input", source, "--output", path)
    assert_one_line(done, f"nanoflow: {path}: ")
    assert (path.read_bytes() if path.is_file() else None) == before
