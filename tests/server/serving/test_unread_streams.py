"""Streams that nobody reads: what the real server holds of them is within the bound that their requests kept to."""

import contextlib
import json
import re
import threading

import grpc
from support.server.clients import metrics, post, tensors
from support.server.requests import A
from support.waiting import until
from tritonclient.grpc import InferInput, service_pb2, service_pb2_grpc

STREAMS, TOKENS = 4, 1000
OUTPUTS = ("finish_reason", "stop_reason", "num_output_tokens", "num_cached_tokens", "cumulative_logprob")
SLACK_BYTES = 4 * 2**20  # the allocator's own, and what the server does beside


class UnreadStream:
    """A request whose responses are never looked at: gRPC's window fills, and the server keeps the rest."""

    def __init__(self, url, model, **inputs):
        made: list[InferInput] = tensors(**inputs)
        request = service_pb2.ModelInferRequest(model_name=model)
        for item in made:
            request.inputs.append(item._get_tensor())
            request.raw_input_contents.append(item._get_content())
        self._over = threading.Event()
        self._channel = grpc.insecure_channel(url)
        self._call = service_pb2_grpc.GRPCInferenceServiceStub(self._channel).ModelStreamInfer(self._requests(request))

    def _requests(self, request):
        yield request
        self._over.wait()

    def close(self):
        self._over.set()
        self._call.cancel()
        self._channel.close()


def tokens_generated(served):
    return metrics(served.metrics_url, "nanoflow")["nanoflow_generation_tokens_total"]


def resident_bytes(pid):
    with open(f"/proc/{pid}/status") as status:
        return int(re.search(r"VmRSS:\s+(\d+) kB", status.read())[1]) * 1024


def test_what_four_unread_streams_leave_in_the_server_is_bounded(served, process_tree):
    server = next(pid for pid, name in process_tree(served.pid).items() if name == "tritonserver")
    sampling = json.dumps({"max_tokens": TOKENS, "ignore_eos": True})
    request = {**A, "stream": True, "sampling_parameters": sampling, **{f"return_{name}": True for name in OUTPUTS}}
    # A refusal says what 256 times as much could take.
    too_many = {**request, "sampling_parameters": json.dumps({"max_tokens": 2 * TOKENS, "n": 128})}
    _, text = post(served.http_url, "nanoflow", "generate_stream", too_many)
    bound = int(re.search(r"could be (\d+): lower", text)[1]) / 256
    before = tokens_generated(served)
    resident = resident_bytes(server)
    with contextlib.ExitStack() as streams:
        for _ in range(STREAMS):
            streams.enter_context(contextlib.closing(UnreadStream(served.grpc_url, "nanoflow", **request)))
        until(lambda: tokens_generated(served) >= before + STREAMS * TOKENS)
        left = resident_bytes(server) - resident
    print(f"{left} bytes of at most {STREAMS * bound:.0f}")
    assert left < STREAMS * bound + SLACK_BYTES
