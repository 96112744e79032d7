"""A server of one checkpoint, which has models of two names, and what the engine alone says."""

import random
import shutil

import pytest
from support.server.requests import GREEDY, WORDS

from benchmarks.models import checkpoints, tiny_tokenizers
from benchmarks.server import add_model
from nanoflow_backend.engine import LLM, SamplingParams
from nanoflow_backend.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Random weights, and a tokenizer of its vocabulary. It never ends by itself."""
    folder = tiny_tokenizers.llama3(tmp_path_factory.mktemp("checkpoint"))
    vocab_size = Tokenizer.from_pretrained(folder).vocab_size
    return checkpoints.save(checkpoints.make("llama", vocab_size=vocab_size, max_position_embeddings=4096), folder)


@pytest.fixture(scope="session")
def served(server, checkpoint, tmp_path_factory):
    """A server without auto-completion; models are loaded by name."""
    repository = tmp_path_factory.mktemp("repository")
    ids_only = tmp_path_factory.mktemp("ids_only")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(checkpoint / name, ids_only)
    add_model(repository, checkpoint, name="nanoflow", schedule="nano-batched-3")
    add_model(repository, ids_only, name="narrow", max_running=1, max_queue_size=1)
    log = tmp_path_factory.mktemp("log") / "server.log"
    arguments = ["--model-control-mode=explicit", "--load-model=nanoflow", "--load-model=narrow"]
    return server(repository, log=log, exit_timeout_s=30, arguments=[*arguments, "--disable-auto-complete-config"])


@pytest.fixture(scope="session")
def llm(checkpoint):
    return LLM.from_pretrained(checkpoint)


@pytest.fixture(scope="session")
def prompts():
    rng = random.Random(3)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 20))) for _ in range(64)]


@pytest.fixture(scope="session")
def expected(llm, prompts):
    return llm.generate(prompts, SamplingParams(**GREEDY))
