"""Stream one completion over gRPC: python examples/grpc_stream.py --prompt "Write a string" """

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
parser.add_argument("--prompt", default="Write a string")
options = parser.parse_args()

inputs = [
    tensor("text_input", "BYTES", [options.prompt.encode()]),
    tensor("stream", "BOOL", [True]),
    tensor("sampling_parameters", "BYTES", [json.dumps({"max_tokens": 64, "temperature": 0}).encode()]),
    tensor("return_finish_reason", "BOOL", [True]),
]
answers = queue.Queue()
with InferenceServerClient(options.url) as client:
    client.start_stream(lambda result, error: answers.put(error or result))
    client.async_stream_infer("nanoflow", inputs, enable_empty_final_response=True)
    print(options.prompt, end="", flush=True)
    final = False
    while not final:
        answer = answers.get()
        if isinstance(answer, Exception):
            raise answer
        print(answer.as_numpy("text_output")[0].decode(), end="", flush=True)
        final = answer.get_response().parameters["triton_final_response"].bool_param
    print(f"\n[{answer.as_numpy('finish_reason')[0].decode()}]")
