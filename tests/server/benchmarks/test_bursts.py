"""A few bursts of streams; `make bursts` sends 300."""

from benchmarks.stress import bursts


def test_every_stream_of_a_burst_ends_once_and_the_server_lives():
    report = bursts.send(bursts=3, streams=48, say=print)
    assert report["failures"] == []
    assert (report["bursts_alive"], report["requests"]) == (3, 144)
