"""Token ids in, token ids out: python examples/token_ids.py --ids 404 264

Several prompts: `input_ids` has them one after another, `input_lengths` says how long each is.
"""

import argparse
import json
import urllib.request

parser = argparse.ArgumentParser()
parser.add_argument("--url", default="localhost:8000")
parser.add_argument("--ids", type=int, nargs="+", default=[404, 264])
options = parser.parse_args()

body = {"input_ids": options.ids, "max_tokens": 8, "temperature": 0}
url = f"http://{options.url}/v2/models/nanoflow/generate"
with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode())) as response:
    print(json.load(response)["output_ids"])
