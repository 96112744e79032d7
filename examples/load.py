"""Clients that each send a request when their last is done: python examples/load.py --clients 16 --requests 64

Every request is accounted for: it is whole, or it is in the list of errors, or this program fails.
"""

import argparse
import asyncio
import collections
import json
import statistics
import time

import numpy as np
from tritonclient.grpc import InferInput
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException


def tensor(name, datatype, values):
    made = InferInput(name, [len(values)], datatype)
    made.set_data_from_numpy(np.array(values, dtype=object if datatype == "BYTES" else bool))
    return made


async def one(client, number):
    """(seconds to the first response, seconds in all, tokens) of a request; raises what the server says."""

    async def requests():
        sampling = json.dumps({"max_tokens": options.tokens, "ignore_eos": True, "seed": number}).encode()
        inputs = [
            tensor("text_input", "BYTES", [f"The {number}th statement".encode()]),
            tensor("sampling_parameters", "BYTES", [sampling]),
            *(tensor(name, "BOOL", [True]) for name in ("stream", "return_num_output_tokens")),
        ]
        yield {"model_name": "nanoflow", "inputs": inputs, "request_id": f"load-{number}"}

    began_s, first_s, tokens = time.perf_counter(), None, 0
    async for result, error in client.stream_infer(requests()):
        if error:
            raise error
        first_s = first_s or time.perf_counter() - began_s
        tokens += int(result.as_numpy("num_output_tokens")[0])
    return first_s, time.perf_counter() - began_s, tokens


async def main():
    numbers = iter(range(options.requests))
    done, errors = [], collections.Counter()

    async def work(client):
        for number in numbers:
            try:
                done.append(await one(client, number))
            except InferenceServerException as error:
                errors[error.message()] += 1

    began_s = time.perf_counter()
    async with InferenceServerClient(options.url) as client:
        await asyncio.gather(*(work(client) for _ in range(options.clients)))
    seconds = time.perf_counter() - began_s

    assert len(done) + sum(errors.values()) == options.requests
    assert all(tokens == options.tokens for _, _, tokens in done)
    for message, count in errors.items():
        print(f"{count} times: {message}")
    print(f"{len(done)} of {options.requests} requests in {seconds:.1f} s: {len(done) / seconds:.1f} requests/s")
    if done:
        first_s, total_s, tokens = zip(*done, strict=True)
        print(f"{sum(tokens) / seconds:.0f} output tokens/s")
        print(
            f"first token after {statistics.median(first_s) * 1e3:.0f} ms (median), {max(first_s) * 1e3:.0f} ms (most)"
        )
        print(f"per token {statistics.median(total_s) / options.tokens * 1e3:.1f} ms (median)")


parser = argparse.ArgumentParser()
parser.add_argument("--url", default="localhost:8001")
parser.add_argument("--clients", type=int, default=16)
parser.add_argument("--requests", type=int, default=64)
parser.add_argument("--tokens", type=int, default=32)
options = parser.parse_args()
asyncio.run(main())
