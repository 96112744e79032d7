"""A model family is a file and a line of the registry: one of the tests' own, with two kinds of layers, is served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from nanoflow_search.request import SearchRequest
from safetensors.torch import save_file
from support.models import layer_kinds
from support.models.layer_kinds import ALTERNATING, CONFIG, LAYERS
from support.models.loading import load_rank

from benchmarks.models.checkpoints import make, save
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.engine import LLM, SamplingParams
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.registry import ARCHITECTURES

CONFIG_JSON = {
    "architectures": [ALTERNATING.hf_class],
    "vocab_size": CONFIG.vocab_size,
    "hidden_size": CONFIG.hidden_size,
    "intermediate_size": CONFIG.intermediate_size,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": CONFIG.num_heads,
    "num_key_value_heads": CONFIG.num_kv_heads,
    "head_dim": CONFIG.head_dim,
    "num_local_experts": CONFIG.num_experts,
    "num_experts_per_tok": CONFIG.experts_per_token,
    "max_position_embeddings": CONFIG.max_model_tokens,
    "rms_norm_eps": CONFIG.rms_norm_eps,
    "rope_theta": CONFIG.rope.theta,
}
PROMPT = [(7 * i * i + 3 * i) % CONFIG.vocab_size for i in range(40)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint by the tensors' names in the graphs: spread enough for every operation to matter."""
    rng, model = torch.Generator().manual_seed(0), layer_kinds.alternating()
    graphs = [("", model.embed), *((str(i), graph) for i, graph in enumerate(model.in_order)), ("", model.head)]
    tensors = {
        source.tensor.replace("{layer}", layer): torch.randn(source.shape, generator=rng) * source.shape[-1] ** -0.5
        for layer, graph in graphs
        for parameter in graph.parameters
        for source in parameter.sources
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_JSON))
    return tmp_path


def test_a_family_that_is_not_registered_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected one of LlamaForCausalLM, .*, got \['AlternatingForCausalLM'\]"):
        read_model_config(folder)


@pytest.mark.parametrize("schedule", ["sequential", "nano-batched-3"])
def test_a_registered_family_is_served(folder: Path, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, ALTERNATING.name, ALTERNATING)
    expected = layer_kinds.logits(load_rank(folder), torch.tensor(PROMPT)).log_softmax(-1)
    llm = LLM.from_pretrained(folder, schedule=schedule, chunk_tokens=16, kv_cache_tokens=512)
    (ours,) = llm.generate([PROMPT], SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0))
    for i, token in enumerate(ours.prompt_logprobs):
        assert token.logprobs[0] == pytest.approx(float(expected[i, PROMPT[i + 1]]), abs=1e-4)
    assert ours.token_ids == [int(expected[-1].argmax())]


def test_plans_are_for_layers_of_one_kind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, ALTERNATING.name, ALTERNATING)
    with pytest.raises(ValueError, match="expected layers of one kind, got 2 kinds"):
        _ = SearchRequest.of(folder, 1, ["1024/512"]).model


@pytest.mark.parametrize("windows", [False, True])
def test_kinds_of_layers_that_cost_the_same_have_plans(windows: bool, tmp_path: Path) -> None:
    """A layer that does not rotate does as much as one that does; one with a window reads less."""
    request = SearchRequest.of(save(make("smollm3", use_sliding_window=windows), tmp_path), 1, ["1024/512"])
    if windows:
        with pytest.raises(ValueError, match="expected layers of one kind, got 2 kinds"):
            _ = request.model
    else:
        assert len(request.model.layers) == 2
