"""What is said of a path that is no model's folder, and of files that a clone has left out."""

import pytest

from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.file import read_file
from nanoflow_backend.model_folder import what_is_wrong
from nanoflow_backend.models.hugging_face import from_hf, read_model_config

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4976698672\n"


def test_a_hub_s_name_is_answered_with_the_command_that_downloads_it(tmp_path):
    told = what_is_wrong(tmp_path / "meta-llama" / "Llama-3.1-8B")
    assert "there is no such folder: expected a local Hugging Face folder" in told
    assert "hf download meta-llama/Llama-3.1-8B --local-dir Llama-3.1-8B" in told
    assert "hf download" not in what_is_wrong(tmp_path / "lama")  # where others are: a typing error


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("model-Q4_K_M.gguf", "GGUF is not read: expected a local Hugging Face folder"),
        ("snapshots/0a1b/config.json", "as in {folder}/snapshots/0a1b"),
        ("params.json", "the authors' own format (params.json)"),
        ("readme.txt", "{folder}/config.json: No such file or directory"),
    ],
)
def test_another_kind_of_folder_is_named(tmp_path, file, told):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).touch()
    assert told.format(folder=tmp_path) in what_is_wrong(tmp_path)
    with pytest.raises(ConfigError) as error:
        read_model_config(tmp_path)
    assert str(error.value) == what_is_wrong(tmp_path)


def test_a_file_is_not_a_folder(tmp_path):
    for name, told in (("x.gguf", "GGUF is not read"), ("x.safetensors", "is a file: expected")):
        (tmp_path / name).touch()
        assert told in what_is_wrong(tmp_path / name)


def test_a_folder_with_a_config_is_right(tmp_path):
    (tmp_path / "config.json").touch()
    (tmp_path / "also.gguf").touch()
    assert what_is_wrong(tmp_path) is None


def test_a_pointer_of_git_lfs_is_named_with_what_to_do(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(POINTER)
    with pytest.raises(ConfigError, match=r"tokenizer\.json: is a Git LFS pointer, .*: run git lfs pull in "):
        read_file(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_quantisation_method_is_named(method):
    hf = {"architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": method, "bits": 4}}
    with pytest.raises(ConfigError, match=rf"quantization_config: quant_method '{method}' is not supported"):
        from_hf(hf, {})


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = EngineConfig.resolve({"model": "~/llama", "schedule": "~/s.json"}, relative_to=tmp_path / "elsewhere")
    assert (config.model, config.schedule) == (f"{tmp_path}/llama", f"{tmp_path}/s.json")
