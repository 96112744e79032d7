"""End a request by its id, from anywhere: python examples/cancel.py

The id is the client's own, so choose one that nobody else does. With `return_finish_reason` a request that is ended has
what it had so far, and "cancelled"; without, an error, so that a part cannot pass for the whole.
"""

import argparse
import json
import threading
import time
import urllib.request
import uuid

parser = argparse.ArgumentParser()
parser.add_argument("--url", default="localhost:8000")
options = parser.parse_args()


def generate(**body):
    url = f"http://{options.url}/v2/models/nanoflow/generate"
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode())) as response:
        return json.load(response)


def ask():
    answer = generate(id=name, text_input="Write", max_tokens=1500, ignore_eos=True, return_finish_reason=True)
    print(f"[{answer['finish_reason']}] after {len(answer['text_output'])} characters")


name = str(uuid.uuid4())
asking = threading.Thread(target=ask)
asking.start()
while asking.is_alive() and not generate(id=name, cancel=True)["num_cancelled"]:  # 0 before it has arrived
    time.sleep(0.05)
asking.join()
