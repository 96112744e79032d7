"""run: lines through a runner to results; on full disks, through kills, and with more lines than memory could hold."""

import random
import resource
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from support.commands.json_lines import read_lines, write_lines
from support.runtime import arithmetic_runner
from support.runtime.arithmetic_runner import MADE_WITH, ArithmeticRunner, TwoRunners

from nanoflow_backend.offline.job_file import JobFile
from nanoflow_backend.offline.result_file import ResultFile
from nanoflow_backend.offline.result_line import result_fields
from nanoflow_backend.offline.run import run_jobs, seeded
from nanoflow_backend.request.invalid_request import InvalidRequest

PROGRAM = Path(arithmetic_runner.__file__)


def make_input(folder, count):
    lines = [{"prompt": f"{number} pages" + "!" * (number % 10 == 7)} for number in range(count)]
    return write_lines(folder / "in.jsonl", [line if number % 11 else b"{bad" for number, line in enumerate(lines)])


def complete(source, output, runner, **limits):
    with ResultFile(output, source) as results:
        for _ in run_jobs(results.resume(JobFile(source).lines(), MADE_WITH), runner, results, **limits):
            pass
    return results


def expected(source):
    def result(line):
        return line.job if isinstance(line.job, InvalidRequest) else arithmetic_runner.answer(line.job[0])

    return [result_fields(line.id, result(line), None) for line in JobFile(source).lines()]


def start(*arguments, **options):
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    command = [sys.executable, PROGRAM, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize(
    "runner", [ArithmeticRunner(), ArithmeticRunner(1), TwoRunners()], ids=["one", "serial", "two"]
)
def test_results_come_in_the_order_of_the_lines_whatever_runs_them(tmp_path, runner):
    source = make_input(tmp_path, 200)
    results = complete(source, tmp_path / "out.jsonl", runner)
    assert read_lines(tmp_path / "out.jsonl") == expected(source)
    assert (results.lines, results.failed) == (200, sum("error" in line for line in expected(source)))
    assert isinstance(runner, ArithmeticRunner) or min(runner.shares) > 20, "both had their part"


def test_a_slow_line_holds_no_more_results_than_it_may(tmp_path):
    source, seen = write_lines(tmp_path / "in.jsonl", [{"prompt": f"{number}"} for number in range(500)]), []
    runner = ArithmeticRunner(slow_first=True)
    with ResultFile(tmp_path / "out.jsonl", source) as results:
        for _ in run_jobs(results.resume(JobFile(source).lines(), MADE_WITH), runner, results, most_early_bytes=2000):
            seen.append(results.early_bytes)
    assert 2000 < max(seen) < 2000 + 7 * 120, "what is running when the bound is reached still ends"
    assert read_lines(tmp_path / "out.jsonl") == expected(source)


def test_memory_does_not_grow_with_the_lines(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": f"{number}" * 100} for number in range(800)])

    def peak(output):
        tracemalloc.start()
        complete(source, output, ArithmeticRunner())
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak_bytes

    output = tmp_path / "out.jsonl"
    assert peak(output) < 200_000, "from nothing"
    assert output.stat().st_size > 1_000_000
    assert peak(output) < 200_000, "from all done"


def test_kills_at_any_point_lose_nothing(tmp_path):
    source, output, draw = make_input(tmp_path, 400), tmp_path / "out.jsonl", random.Random(0)
    before, kills = b"", 0
    for _ in range(25):
        child = start(source, output, 0.002)
        deadline = time.monotonic() + 10
        while not output.exists() and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)  # imports
        time.sleep(draw.uniform(0, 0.12))
        child.kill()
        kills += child.wait() == -9
        assert child.stderr.read() == ""
        now = output.read_bytes()
        assert now.startswith(before[: before.rfind(b"\n") + 1]), "no result is lost"
        before = now
    assert kills > 5
    complete(source, output, ArithmeticRunner())
    assert read_lines(output) == expected(source)


def limit_file_size(most_bytes):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))


def test_a_disk_that_fills_up_is_one_line_and_loses_nothing(tmp_path):
    """Files may grow to 100 kB, as on a disk with so much room."""
    source, output = write_lines(tmp_path / "in.jsonl", [{"prompt": f"{n}" * 200} for n in range(300)]), tmp_path / "o"
    child = start(source, output, preexec_fn=limit_file_size(100_000))
    _, message = child.communicate(timeout=60)
    done = len(read_lines(output))
    assert 10 < done < 300, "whole lines"
    assert child.returncode == 1
    assert message == f"{output}: File too large; {done} lines are done and kept: the same command goes on from there\n"
    complete(source, output, ArithmeticRunner())
    assert read_lines(output) == expected(source)


def test_a_full_disk_is_found_before_work_begins(tmp_path):
    source, output = make_input(tmp_path, 3), tmp_path / "out.jsonl"
    child = start(source, output, preexec_fn=limit_file_size(1000))
    _, message = child.communicate(timeout=60)
    assert (child.returncode, message) == (1, f"{output}: File too large\n")
    assert not output.exists()


def test_the_standard_output_is_a_file_or_refused(tmp_path):
    source = make_input(tmp_path, 3)
    with (tmp_path / "out.jsonl").open("ab") as file:
        assert start(source, "/dev/stdout", stdout=file).wait(60) == 0
        assert read_lines(tmp_path / "out.jsonl") == expected(source)
        assert start(source, "/dev/stdout", stdout=file).wait(60) == 0, "and is gone on with"
    piped = start(source, "/dev/stdout", stdout=subprocess.PIPE)
    text, message = piped.communicate(timeout=60)
    assert (piped.returncode, text) == (1, "")
    assert message.startswith("/dev/stdout: expected a regular file")


def test_a_job_s_seed_is_its_own_or_drawn_by_its_line(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "a"}, {"prompt": "a"}, {"prompt": "a", "seed": 7}])
    jobs = [line.job for line in JobFile(source).lines()]
    drawn = [seeded(job, 0, number)[1].seed for number, job in enumerate(jobs)]
    assert drawn[2] == 7
    assert len({*drawn, seeded(jobs[0], 1, 0)[1].seed}) == 4
    assert seeded(jobs[1], 0, 1) == seeded(jobs[1], 0, 1)
