"""A folder of the vLLM backend that reports its metrics: a real server's page has them, under vLLM's names."""

import re

from support.server.clients import grpc, metrics_page
from support.waiting import until

from nanoflow_backend.engine import SamplingParams

PROMPTS = ["The dog is", "All that the license says of", "You may"]
ROUNDS = 2  # the second finds the counts of the first
GREEDY = {"temperature": "0", "top_p": "1"}


def shown(demo):
    """The value of each name, of a histogram's buckets the widest, and the labels of all of its lines."""
    values, labels = {}, {}
    for name, of_line, value in re.findall(r"^(vllm:\w+){(.*)} ([0-9.-]+)$", metrics_page(demo.metrics_url), re.M):
        pairs = dict(re.findall(r'(\w+)="(.*?)"', of_line))
        assert pairs["model"] == pairs["model_name"] != "unary", "which has chosen other dialects"
        if pairs["model"] == "reporting":
            if pairs.get("le", "+Inf") == "+Inf":
                values[name] = float(value)
            labels.setdefault(name, set()).update(pairs)
    return values, labels


def ask(demo, **sampling):
    for prompt in PROMPTS:
        (response,) = grpc(demo.grpc_url, "reporting", text_input=prompt, stream=False, parameters=sampling)
        assert response["text_output"]
        grpc(demo.grpc_url, "nanoflow", text_input=prompt, stream=False, parameters=sampling)


def test_the_metrics_of_the_vllm_backend_are_counted_exactly(demo, demo_llm):
    whole = demo_llm.generate(PROMPTS, SamplingParams(temperature=0.0))
    requests = len(PROMPTS) * ROUNDS
    prompt_tokens = ROUNDS * sum(completion.num_input_tokens for completion in whole)
    output_tokens = ROUNDS * sum(len(completion.token_ids) for completion in whole)
    for _ in range(ROUNDS):
        ask(demo, **GREEDY)
    until(lambda: shown(demo)[0]["vllm:request_generation_tokens_count"] == requests)
    values, labels = shown(demo)
    assert values["vllm:prompt_tokens_total"] == prompt_tokens
    assert values["vllm:generation_tokens_total"] == output_tokens
    counts = {
        "vllm:time_to_first_token_seconds": requests,
        "vllm:time_per_output_token_seconds": output_tokens - requests,
        "vllm:e2e_request_latency_seconds": requests,
        "vllm:request_prompt_tokens": requests,
        "vllm:request_generation_tokens": requests,
        "vllm:request_params_n": requests,
    }
    for name, count in counts.items():
        assert values[f"{name}_count"] == values[f"{name}_bucket"] == count, name
        assert values[f"{name}_sum"] > 0, name
        assert labels[f"{name}_bucket"] == {"model", "version", "model_name", "le"}
    assert values["vllm:request_prompt_tokens_sum"] == prompt_tokens
    assert values["vllm:request_generation_tokens_sum"] == output_tokens
    of_model = {"model", "version", "model_name"}
    assert labels["vllm:prompt_tokens_total"] == labels["vllm:request_params_n_sum"] == of_model
    assert labels["vllm:num_requests_running"] == of_model | {"engine"}

    ask(demo, temperature="1", top_p="1", n="2")
    until(lambda: shown(demo)[0]["vllm:request_params_n_count"] == requests + len(PROMPTS))
    assert shown(demo)[0]["vllm:request_params_n_sum"] == requests + 2 * len(PROMPTS)
