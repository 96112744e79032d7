#!/bin/sh
# The HTTP endpoints with curl: examples/curl.sh [host:port]
set -eu
url=http://${1:-localhost:8000}/v2

curl -sS --fail-with-body "$url/health/ready"
curl -sS --fail-with-body "$url/models/nanoflow/ready"

# One answer, the prompt first; parameters of sampling stand beside the inputs.
curl -sS --fail-with-body "$url/models/nanoflow/generate" \
    -d '{"text_input": "Write a string", "max_tokens": 16, "temperature": 0, "stop": ["\n\n", "."]}'
echo

# A stream of events; the outputs that are switched on come with the text.
curl -sSN --fail-with-body "$url/models/nanoflow/generate_stream" \
    -d '{"text_input": "Write a string", "max_tokens": 8, "temperature": 0, "stream": true, "return_finish_reason": true}'

# Two prompts at once, and what there is to know about their tokens.
curl -sS --fail-with-body "$url/models/nanoflow/generate" \
    -d '{"prompts": ["Write a", "Return"], "max_tokens": 8, "return_num_output_tokens": true, "return_output_ids": true}'
echo

# End the requests with an id; none has it here.
curl -sS --fail-with-body "$url/models/nanoflow/generate" -d '{"id": "my-request", "cancel": true}'
echo

# A mistake is named.
curl -sS "$url/models/nanoflow/generate" -d '{"text_input": "Write a string", "temperature": -1}'
echo
