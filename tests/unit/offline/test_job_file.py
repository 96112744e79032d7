"""JobFile: what counts as a line, and what is wrong with one."""

import os
import threading

import pytest
from support.commands.json_lines import write_lines

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.offline.job_file import JobFile, parse_line
from nanoflow_backend.request.invalid_request import InvalidRequest


def prompts(path):
    return [line.job[0] for line in JobFile(path).lines()]


def test_blank_lines_have_no_number_but_a_place(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\n{"prompt": "a"}\r\n  \t\r\n\n{"prompt": "b", "id": "x"}\n{"prompt": "c"}')
    assert [(line.number, line.place, line.id, line.job[0]) for line in JobFile(path).lines()] == [
        (0, 2, 0, "a"),
        (1, 5, "x", "b"),
        (2, 6, 2, "c"),
    ]
    assert JobFile(path).count() == 3


def test_a_byte_order_mark_is_read_over(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n{"prompt": "b"}\n')
    assert prompts(path) == ["a", "b"]
    path.write_bytes(b"\xef\xbb\xbf\n")
    assert (prompts(path), JobFile(path).count()) == ([], 0)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_is_named_before_work_begins(tmp_path, encoding):
    path = tmp_path / "in.jsonl"
    path.write_bytes('\ufeff{"prompt": "a"}\n'.encode(encoding))
    with pytest.raises(ConfigError, match=r"in\.jsonl: expected UTF-8, got UTF-16"):
        JobFile(path)


def test_what_is_no_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.jsonl: No such file or directory"):
        JobFile(tmp_path / "nowhere.jsonl")
    with pytest.raises(ConfigError, match="Is a directory"):
        JobFile(tmp_path)


def test_a_pipe_is_read_once_and_not_counted(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: path.write_bytes(b'{"prompt": "a"}\n{"prompt": "b"}\n'))
    file = JobFile(path)
    assert file.count() is None
    writer.start()
    assert prompts(path) == ["a", "b"]
    writer.join()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{not json", "expected a JSON object"),
        (b"[1]", "expected a JSON object"),
        (b'{"prompt": "\xff"}', "'utf-8' codec can't decode byte 0xff"),
        (b'{"prompt": ' * 20_000, "nested too deeply"),
        ({"max_tokens": 3}, "expected either prompt or prompt_token_ids"),
        ({"prompt": "a", "prompt_token_ids": [1]}, "expected either prompt or prompt_token_ids"),
        ({"prompt": 7}, "prompt: Expected `str`, got `int`"),
        ({"prompt_token_ids": ["x"]}, "prompt_token_ids: Expected `int`, got `str`"),
        ({"prompt": "a", "temprature": 1}, "temprature: unknown sampling parameter"),
        ({"prompt": "a", "n": 2}, "n: expected 1, for every line has one result, got 2"),
    ],
)
def test_a_bad_line_says_what_is_wrong(tmp_path, line, message):
    (read,) = JobFile(write_lines(tmp_path / "in.jsonl", [line])).lines()
    assert isinstance(read.job, InvalidRequest)
    assert message in str(read.job)


def test_the_digest_is_that_of_the_line_without_the_space_around_it(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n  {"prompt": "a"}\r\n{"prompt": "a" }\n')
    same, also, other = (line.digest for line in JobFile(path).lines())
    assert same == also != other


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"], ids=["no mark", "mark", "mark alone"])
@pytest.mark.parametrize("lines_each", [1, 2, 3, 100])
def test_ranges_read_apart_are_the_lines_of_the_whole(tmp_path, mark, lines_each):
    """A byte order mark means something before the first line alone, wherever a range begins."""
    path = tmp_path / "in.jsonl"
    marked, utf_16 = b'\xef\xbb\xbf{"prompt": "c"}', b'\xff\xfe{"prompt": "d"}'
    path.write_bytes(
        mark + b"\n".join([b'{"prompt": "a"}', b"", b"bad\r", marked, b" \t\r", utf_16, b'{"prompt": "e"}'])
    )
    file = JobFile(path)
    whole = [(line.number, line.digest) for line in file.lines()]
    assert len(whole) == 5
    for first in range(6):
        ranges = file.ranges(first, lines_each)
        assert all(part.lines == lines_each for part in ranges[:-1])
        read = [parse_line(text, number, 0) for part in ranges for number, text in file.read(part)]
        assert [(line.number, line.digest) for line in read] == whole[first:]


def test_a_file_that_was_cut_since_its_ranges_were_taken_is_named(tmp_path):
    path = write_lines(tmp_path / "in.jsonl", [{"prompt": "a"}] * 4)
    (part,) = JobFile(path).ranges(0, 10)
    write_lines(path, [{"prompt": "a"}] * 3)
    with pytest.raises(ConfigError, match=r"in\.jsonl: has fewer lines than when the run began"):
        list(JobFile(path).read(part))


def test_a_pipe_has_no_ranges(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="pipe: expected a regular file"):
        JobFile(tmp_path / "pipe").ranges(0, 1)
