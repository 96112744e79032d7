"""Several completions at once over gRPC, with asyncio: python examples/grpc_async.py "Write a string" "Raise" """

import argparse
import asyncio
import json

import numpy as np
from tritonclient.grpc import InferInput
from tritonclient.grpc.aio import InferenceServerClient


def tensor(name, datatype, values):
    made = InferInput(name, [len(values)], datatype)
    made.set_data_from_numpy(np.array(values, dtype=object if datatype == "BYTES" else bool))
    return made


async def complete(client, prompt):
    """The text that follows a prompt, which comes piece by piece."""

    async def requests():
        sampling = json.dumps({"max_tokens": 32, "temperature": 0}).encode()
        inputs = [
            tensor("text_input", "BYTES", [prompt.encode()]),
            tensor("stream", "BOOL", [True]),
            tensor("sampling_parameters", "BYTES", [sampling]),
        ]
        yield {"model_name": "nanoflow", "inputs": inputs}

    text = ""
    async for result, error in client.stream_infer(requests()):
        if error:
            raise error
        text += result.as_numpy("text_output")[0].decode()
    return text


async def main(url, prompts):
    async with InferenceServerClient(url) as client:
        for prompt, text in zip(prompts, await asyncio.gather(*(complete(client, p) for p in prompts)), strict=True):
            print(f"{prompt}{text}\n---")


parser = argparse.ArgumentParser()
parser.add_argument("--url", default="localhost:8001")
parser.add_argument("prompts", nargs="*", default=["Write a string", "Return a list"])
options = parser.parse_args()
asyncio.run(main(options.url, options.prompts))
