"""A tokenizer, and TritonPythonModel without a server: a stand-in for the stub's module and for the engine process."""

import json

import pytest
from support.serving.fake_engine import FakeEngine

from benchmarks.models import tiny_tokenizers
from benchmarks.stress import stub_backend
from nanoflow_backend.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return Tokenizer.from_pretrained(tiny_tokenizers.llama3(tmp_path_factory.mktemp("llama3")))


@pytest.fixture(scope="module")
def module():
    with stub_backend.model_module() as model, pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "Supervisor", FakeEngine)
        yield model


@pytest.fixture
def args(tmp_path):
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "engine.json").write_text('{"model": "../checkpoint"}')
    (tmp_path / "checkpoint").mkdir()
    tiny_tokenizers.llama3(tmp_path / "checkpoint")
    config = {
        "model_transaction_policy": {"decoupled": True},
        "parameters": {
            "page_tokens": {"string_value": "32"},
            "EXECUTION_ENV_PATH": {"string_value": "/environment"},
        },
    }
    return {
        "model_instance_name": "tiny_0_0",
        "model_instance_kind": "MODEL",
        "model_instance_device_id": "0",
        "model_config": json.dumps(config),
        "model_repository": str(tmp_path),
        "model_version": "1",
        "model_name": "tiny",
    }


@pytest.fixture
def served(module, args):
    model = module.TritonPythonModel()
    model.initialize(args)
    yield model, FakeEngine.latest
    model.finalize()
