"""Several prompts in one request, streamed: python examples/batch.py "Write a string" "Return a list"

Each response is about one of them, and `batch_index` says which. Without `stream` there is one response, in which every
output has an element for each prompt.
"""

import argparse
import json
import queue

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput


def tensor(name, datatype, values):
    made = InferInput(name, [len(values)], datatype)
    made.set_data_from_numpy(np.array(values, dtype=object if datatype == "BYTES" else bool))
    return made


parser = argparse.ArgumentParser()
parser.add_argument("--url", default="localhost:8001")
parser.add_argument("prompts", nargs="*", default=["Write a string", "Return a list"])
options = parser.parse_args()

inputs = [
    tensor("prompts", "BYTES", [prompt.encode() for prompt in options.prompts]),
    tensor("stream", "BOOL", [True]),
    tensor("sampling_parameters", "BYTES", [json.dumps({"max_tokens": 24, "temperature": 0}).encode()]),
]
answers = queue.Queue()
texts = list(options.prompts)
with InferenceServerClient(options.url) as client:
    client.start_stream(lambda result, error: answers.put(error or result))
    client.async_stream_infer("nanoflow", inputs, enable_empty_final_response=True)
    final = False
    while not final:
        answer = answers.get()
        if isinstance(answer, Exception):
            raise answer
        texts[answer.as_numpy("batch_index")[0]] += answer.as_numpy("text_output")[0].decode()
        final = answer.get_response().parameters["triton_final_response"].bool_param
print("\n---\n".join(texts))
