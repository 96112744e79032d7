"""Workloads: the lengths are those that were asked for, and the same on every run."""

from statistics import mean, stdev

import pytest

from nanoflow_backend.bench.workload import DATASETS, WorkloadSpec, asked_for, constant, drawn, of_trace
from nanoflow_backend.config.error import ConfigError


@pytest.mark.parametrize("dataset", DATASETS)
def test_drawn_lengths_have_the_moments_of_the_papers_table(dataset):
    work = drawn(dataset, 100_000, max_model_tokens=10**9)
    assert work.facts["lengths_clipped"] == 0
    for column, (expected_mean, expected_std) in zip(zip(*work.lengths, strict=True), DATASETS[dataset], strict=True):
        assert min(column) >= 1
        assert mean(column) == pytest.approx(expected_mean, rel=0.02)
        assert stdev(column) == pytest.approx(expected_std, rel=0.06)


def test_drawn_lengths_fit_the_model_and_say_how_many_were_cut():
    whole, cut = (drawn("sharegpt-like", 2000, limit) for limit in (10**9, 1024))
    longer = sum(sum(lengths) > 1024 for lengths in whole.lengths)
    assert cut.facts["lengths_clipped"] == longer > 0
    assert all(sum(lengths) <= 1024 and min(lengths) >= 1 for lengths in cut.lengths)
    assert whole == drawn("sharegpt-like", 2000, 10**9)


def test_prompts_are_ids_of_the_vocabulary_and_share_no_prefix():
    work = constant(16, 3, 50)
    prompts = list(work.prompts(vocab_size=997))
    assert [len(prompt) for prompt in prompts] == [16] * 50
    assert all(0 <= token < 997 for prompt in prompts for token in prompt)
    assert len({tuple(prompt[:4]) for prompt in prompts}) == 50
    assert prompts == list(work.prompts(vocab_size=997))
    assert not {tuple(prompt[:4]) for prompt in prompts} & {tuple(p[:4]) for p in work.prompts(997, seed=1)}
    assert (work.name, work.input_tokens, work.output_tokens) == ("16/3", 800, 150)


def test_a_trace_without_requests_is_named(tmp_path):
    path = tmp_path / "empty.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2024-01-01 00:00:00,0,3\n")
    with pytest.raises(ConfigError, match=r"empty\.csv: expected a row with input and output tokens"):
        of_trace(path, 10, 100)


def test_rows_of_a_trace_are_drawn_from_all_of_it(tmp_path):
    path = tmp_path / "trace.csv"
    rows = [(i, 1) for i in range(1, 101)]
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        + "".join(f"2024-01-01 00:00:00,{input_tokens},{output_tokens}\n" for input_tokens, output_tokens in rows)
    )
    work = of_trace(path, 20, max_model_tokens=91)
    assert work.facts == {"trace_rows_dropped": 0, "trace_rows_too_long": 10}
    assert len(set(work.lengths)) == 20
    assert set(work.lengths) <= set(rows[:90])
    assert max(work.lengths) > (60, 1)
    assert work == of_trace(path, 20, max_model_tokens=91)


def test_workloads_are_named_by_their_lengths_and_requests(tmp_path):
    trace = tmp_path / "a:b.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2024-01-01 00:00:00,5,3\n")
    specs = asked_for(["1024/512:1500", f"{trace}:7", "lmsys-like:9"], None, None, (1, 1), 1)
    assert specs == [WorkloadSpec((1024, 512), 1500), WorkloadSpec(trace, 7), WorkloadSpec("lmsys-like", 9)]
    assert [spec.read(8192) for spec in specs] == [
        constant(1024, 512, 1500),
        of_trace(trace, 7, 8192),
        drawn("lmsys-like", 9, 8192),
    ]
    assert asked_for([], None, None, (5, 6), 7) == [WorkloadSpec((5, 6), 7)]
    assert asked_for([], trace, None, (5, 6), 7) == [WorkloadSpec(trace, 7)]
    assert asked_for([], None, "lmsys-like", (5, 6), 7) == [WorkloadSpec("lmsys-like", 7)]


@pytest.mark.parametrize(
    "text", ["", "1024/512", "1024/512:0", "0/5:1", "5/0:1", "1024:5", "chat:5", "1/1:1x", ".csv:1"]
)
def test_a_workload_that_cannot_be_read_is_named(text):
    with pytest.raises(ConfigError, match=r"--workload: expected LENGTHS:REQUESTS .* such as 1024/512:1500, got"):
        WorkloadSpec.parse(text)


def test_a_trace_that_is_not_there_is_named_before_anything_runs(tmp_path):
    with pytest.raises(ConfigError, match=r"--workload: .*absent\.csv: there is no such file"):
        WorkloadSpec.parse(f"{tmp_path}/absent.csv:3")


def test_lengths_come_from_one_option(tmp_path):
    for workloads, trace, dataset, message in (
        ([], tmp_path, "lmsys-like", "--dataset: expected none beside --trace"),
        (["1/1:1"], tmp_path, None, "--workload: expected none beside --trace"),
        (["1/1:1"], None, "lmsys-like", "--workload: expected none beside --dataset"),
    ):
        with pytest.raises(ConfigError, match=message):
            asked_for(workloads, trace, dataset, (1, 1), 1)
