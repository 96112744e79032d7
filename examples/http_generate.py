"""One completion over HTTP at once, and one as server-sent events; nothing but the standard library.

python examples/http_generate.py --prompt "Write a string"
"""

import argparse
import json
import sys
import urllib.error
import urllib.request

parser = argparse.ArgumentParser()
parser.add_argument("--url", default="localhost:8000")
parser.add_argument("--prompt", default="Write a string")
options = parser.parse_args()


def post(endpoint, **body):
    url = f"http://{options.url}/v2/models/nanoflow/{endpoint}"
    try:
        return urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()))
    except urllib.error.HTTPError as refusal:  # its body says why
        sys.exit(refusal.read().decode())


request = {"text_input": options.prompt, "max_tokens": 32, "temperature": 0}
with post("generate", **request, return_finish_reason=True) as response:
    answer = json.load(response)
print(f"{answer['text_output']}\n[{answer['finish_reason']}]")

counts = {"return_num_output_tokens": True, "return_total_output_tokens": True}
received, total = 0, None
with post("generate_stream", **request, **counts, stream=True) as events:
    print(options.prompt, end="")
    for line in events:
        if not line.startswith(b"data: "):
            continue
        event = json.loads(line.removeprefix(b"data: "))
        if "error" in event:  # the status of a stream that has begun stays 200
            sys.exit(event["error"])
        print(event["text_output"], end="", flush=True)
        received += event["num_output_tokens"]
        total = event.get("total_output_tokens", total)
print(f"\n[{received} of {total} tokens]")
if received != total:  # over HTTP the server itself can lose responses of a fast stream
    sys.exit("a part of the stream was lost")
