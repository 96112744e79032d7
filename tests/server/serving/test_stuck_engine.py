"""An engine that is stopped under load: every client is answered in time, and the next engine serves."""

import contextlib
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import tritonclient.grpc
from support.process_tree import alive
from support.server.clients import GrpcStream, generate, grpc, metrics, post
from support.server.requests import GREEDY, A, refused
from support.waiting import until
from tritonclient.utils import InferenceServerException

from benchmarks.server import add_model
from benchmarks.serving import server_state

STALL_S = 4.0
LATEST_S = 1.0  # after its timeout, or at once
LONG = {"max_tokens": 4000, "ignore_eos": True}
KILLED = "was killed: it made no step for 4 s"


@pytest.fixture(scope="module")
def engine(served, checkpoint):
    """A model of its own, and a function: the process id of its engine, now."""
    add_model(served.model_repository, checkpoint, name="stuck", max_running=4, engine_stall_s=STALL_S)
    before = set(server_state.by_role(served)["engine"])
    with contextlib.closing(tritonclient.grpc.InferenceServerClient(served.grpc_url)) as client:
        client.load_model("stuck")
        yield lambda: next(iter(set(server_state.by_role(served)["engine"]) - before), None)
        client.unload_model("stuck")
        until(lambda: set(server_state.by_role(served)["engine"]) <= before)


def timed(call, *arguments, **keywords):
    begun_s = time.monotonic()
    answer = call(*arguments, **keywords)
    return time.monotonic() - begun_s, answer


def stream(served, prompt, sampling):
    return GrpcStream(
        served.grpc_url, "stuck", text_input=prompt, stream=True, sampling_parameters=json.dumps(sampling)
    )


def over_grpc(served, **request):
    with pytest.raises(InferenceServerException) as error:
        grpc(served.grpc_url, "stuck", **request)
    return str(error.value)


def test_no_client_waits_for_a_stopped_engine_which_is_replaced(served, engine, prompts, expected):
    pid = engine()
    with ThreadPoolExecutor(80) as pool, contextlib.closing(stream(served, prompts[0], LONG)) as running:
        start = lambda call, *arguments, **request: pool.submit(timed, call, *arguments, **request)  # noqa: E731
        http = lambda body: start(post, served.http_url, "stuck", "generate", body)  # noqa: E731
        next(iter(running))
        os.kill(pid, signal.SIGSTOP)
        stopped_s = time.monotonic()
        # Forty of these are more than the socket to the engine holds.
        patient = [http({"input_ids": [5] * 4000, **LONG}) for _ in range(40)]
        limited = {
            timeout_s: [
                *(http({**A, **LONG, "timeout": int(1e6 * timeout_s)}) for _ in range(4)),
                *(start(over_grpc, served, **A, timeout_us=int(1e6 * timeout_s)) for _ in range(4)),
                http({**A, "queue_timeout": int(1e6 * timeout_s)}),
            ]
            for timeout_s in (0.3, 1.5)
        }
        invalid = [http({**A, "temperature": -1}) for _ in range(4)]
        cancel = start(grpc, served.grpc_url, "stuck", cancel=True, request_id="nobody's")
        for timeout_s, answers in ((0.0, [*invalid, cancel]), *limited.items()):
            for answer in answers:
                took_s, said = answer.result(60)
                assert timeout_s <= took_s < timeout_s + LATEST_S, said
        assert all("temperature: expected" in answer.result()[1][1] for answer in invalid)
        for timeout_s, answers in limited.items():
            for said in (str(answer.result()[1]) for answer in answers):
                assert f"timeout: not done {int(1e6 * timeout_s)} us" in said or "queue_timeout: still waiting" in said
        assert metrics(served.metrics_url, "stuck")["nanoflow_stats_age_seconds"] >= 1
        with refused(KILLED):
            list(running)
        assert time.monotonic() - stopped_s > STALL_S - 1, "it was given its time, but for a heartbeat's"
        assert all(KILLED in answer.result(60)[1][1] for answer in patient)
        with refused(KILLED + ".*restart 1 of 5 is under way: try again later"):
            grpc(served.grpc_url, "stuck", **A)
    counted = {"deadline": 16, "queue_timeout": 2, "engine_failure": 41, "invalid": 4}
    shown = {f'nanoflow_requests_refused_total{{reason="{reason}"}}': number for reason, number in counted.items()}
    until(lambda: shown.items() <= metrics(served.metrics_url, "stuck").items())
    until(lambda: post(served.http_url, "stuck", "generate", A)[0] == 200)
    assert not alive(pid)
    assert generate(served.http_url, "stuck", text_input=prompts[0], **GREEDY)["text_output"].endswith(expected[0].text)
    until(lambda: metrics(served.metrics_url, "stuck")["nanoflow_engine_restarts_total"] == 1)


def test_a_short_pause_costs_nobody_anything_but_time(served, engine, prompts, expected):
    until(engine)
    pid = engine()
    streams = [stream(served, prompt, GREEDY) for prompt in prompts[:8]]
    os.kill(pid, signal.SIGSTOP)
    streams.append(stream(served, prompts[8], GREEDY))
    time.sleep(STALL_S / 2)
    os.kill(pid, signal.SIGCONT)
    for answer, completion in zip(streams, expected, strict=False):
        assert "".join(response["text_output"] for response in answer) == completion.text
        answer.close()
    assert engine() == pid
