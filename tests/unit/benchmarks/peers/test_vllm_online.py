"""The open loop on vLLM, with a vLLM that is made up: it gets what our engine gets, and its tokens are all counted."""

import asyncio
import json
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
from support.places import DEMO_MODEL
from typer import Typer
from typer.testing import CliRunner

from benchmarks.peers import vllm_online
from nanoflow_backend.bench.online.arrivals import Load
from nanoflow_backend.models.hugging_face import read_model_config

TOKEN_S = 0.002


class AsyncLLM:
    """A token of each request every TOKEN_S; a prompt that begins with `refuses` is refused."""

    refuses = None

    def __init__(self, arguments):
        self.arguments, self.got, self.aborted, self.ran, self.ended = arguments, [], 0, [], False

    @classmethod
    def from_engine_args(cls, arguments):
        asyncio.get_running_loop()  # vLLM reads its engine's outputs only where there is one
        AsyncLLM.made = cls(arguments)
        return AsyncLLM.made

    async def collective_rpc(self, method, args):
        self.ran.append((method, args))
        return [0.02]

    async def generate(self, prompt, params, request_id):
        self.got.append((prompt["prompt_token_ids"], params["max_tokens"], request_id))
        if prompt["prompt_token_ids"] == self.refuses:
            raise ValueError("too long")
        try:
            for number in range(params["max_tokens"]):
                await asyncio.sleep(TOKEN_S)
                token = SimpleNamespace(token_ids=[number])
                yield SimpleNamespace(outputs=[token], finished=number + 1 == params["max_tokens"])
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted += 1
            raise

    def shutdown(self):
        self.ended = True


@pytest.fixture
def fake(monkeypatch):
    kinds = SimpleNamespace(DELTA="delta")
    modules = {
        "vllm": {"SamplingParams": dict},
        "vllm.engine.arg_utils": {"AsyncEngineArgs": dict},
        "vllm.sampling_params": {"RequestOutputKind": kinds},
        "vllm.v1.engine.async_llm": {"AsyncLLM": AsyncLLM},
    }
    for name in ("vllm.engine", "vllm.v1", "vllm.v1.engine", *modules):
        module = ModuleType(name)
        vars(module).update(modules.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(vllm_online.os, "environ", {})
    monkeypatch.setattr(AsyncLLM, "refuses", None)
    return AsyncLLM


def test_vllm_gets_the_requests_that_our_engine_gets(fake, tmp_path):
    app = Typer()
    app.command()(vllm_online.main)
    load = Load((40.0,), warm_up_s=0.2, duration_s=0.5, lengths=(7, 4))
    options = ("--rate", "40", "--warm-up", "0.2", "--duration", "0.5", "--input-tokens", "7", "--output-tokens", "4")
    limits, output = ("--ttft-limit", "60000"), tmp_path / "r.json"
    done = CliRunner().invoke(app, ["--model", str(DEMO_MODEL), *options, *limits, "--output", str(output)])
    assert done.exit_code == 0, done.output
    (arrivals,) = load.arrivals(8192)
    prompts = list(arrivals.prompts(read_model_config(DEMO_MODEL).vocab_size))
    got, sent = fake.made.got, len(fake.made.got)
    assert [(prompt, tokens) for prompt, tokens, _ in got] == [(prompt, 4) for prompt in prompts[:sent]]
    assert len({request_id for *_, request_id in got}) == sent >= arrivals.measured.stop
    (rate,) = json.loads(output.read_text())["rates"]
    assert (rate["requests"], rate["failed"], rate["goodput_share"]) == (len(arrivals.measured), {}, 1.0)
    assert rate["between_tokens_ms"]["p50"] >= 1e3 * TOKEN_S
    assert fake.made.arguments["skip_tokenizer_init"]
    assert fake.made.arguments["enable_prefix_caching"] is False
    assert fake.made.ran == [("apply_model", (vllm_online.draw_weights,))]
    assert fake.made.ended


def news_until(target, requests):
    found, until_s = [], time.perf_counter() + 20
    while sum(news.ended for news in found) < requests:
        assert time.perf_counter() < until_s
        found += target.receive(until_s)
    return found


def test_a_failure_is_news_and_what_runs_is_aborted(fake):
    fake.refuses = [9, 9]
    target = vllm_online.VllmTarget({"model": "m"})
    target.send(0, [1, 2], 3)
    target.send(1, [9, 9], 3)
    found = news_until(target, 2)
    assert [news.failed for news in found if news.request == 1] == ["ValueError: too long"]
    assert sum(news.tokens for news in found if news.request == 0) == 3
    target.send(2, [1, 2], 10**6)
    assert target.receive(time.perf_counter() + 20)
    target.stop()
    assert fake.made.aborted == 1
    assert target.receive(time.perf_counter() + 3 * TOKEN_S) == [], "nothing of the last run is news of the next"
    target.close()


def test_without_vllm_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(vllm_online.os, "environ", {})
    with pytest.raises(SystemExit, match="pip install vllm"):
        vllm_online.VllmTarget({})
