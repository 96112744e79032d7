"""The committed demo model is what its card says, loads in transformers, and can be trained again."""

import hashlib
import json
import platform
import re

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo.corpus import SECTION_CHARACTERS, TEXT_PYTHON, TEXT_SHA256, Document, chat, documents, sections, text_sha256
from demo.train import FOLDER, seen_and_held_out, train, train_tokenizer

PROMPTS = ("The with statement", "Write a string", "The class", "A tuple of")


@pytest.fixture(scope="module")
def texts() -> list[Document]:
    return documents()


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture
def restored_torch_settings():
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def greedy(model, ids: list[int], tokens: int) -> tuple[list[int], torch.Tensor]:
    """Return the greedy continuation and the logits [tokens, vocabulary] that chose it."""
    inputs = torch.tensor([ids])
    out = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, len(ids) :].tolist(), torch.cat(out.logits)


def test_card_names_every_file_with_its_sha256():
    card = (FOLDER / "README.md").read_text()
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in FOLDER.iterdir()}
    del files["README.md"]
    assert dict(re.findall(r"\| sha256 of (\S+) \| (\w{64}) \|", card)) == files
    assert f"| sha256 of the text | {TEXT_SHA256} |" in card


def test_size_and_shape(model):
    assert 1_000_000 <= sum(weight.numel() for weight in model.parameters()) <= 3_000_000
    assert (FOLDER / "model.safetensors").stat().st_size <= 8_000_000
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["vocab_size"] % 64
    assert config["num_attention_heads"] > config["num_key_value_heads"] > 1


@pytest.mark.parametrize(
    "text", ["def f(x):\n    return  x\n", "naïve café 数据 🐍", " leading and trailing ", "a\tb\r\n , isn 't", ""]
)
def test_text_round_trips(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids == Tokenizer.from_file(str(FOLDER / "tokenizer.json")).encode(text).ids
    assert ids[0] == tokenizer.bos_token_id == 0
    assert tokenizer.decode(ids[1:]) == text


def test_chat_template_gives_special_tokens_and_the_answer_ends(tokenizer, model):
    messages = [{"role": "system", "content": "You explain Python."}, {"role": "user", "content": "What is OSError?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|begin|><|system|>You explain Python.<|turn_end|><|user|>What is OSError?<|turn_end|><|assistant|>"
    )
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    begin, end, turn_end, system, user, assistant = range(6)
    assert [token for token in ids if token < 6] == [begin, system, turn_end, user, turn_end, assistant]
    assert model.generation_config.bos_token_id == begin
    assert model.generation_config.eos_token_id == [end, turn_end]
    answer, _ = greedy(model, ids, 60)
    assert answer[-1] == turn_end, tokenizer.decode(answer)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_words_with_margins(model, tokenizer, texts, prompt):
    known = {word for document in texts for word in re.findall(r"[a-z]+", document.text.lower())}
    ids, logits = greedy(model, tokenizer(prompt)["input_ids"], 128)
    words = re.findall(r"[a-z]+", tokenizer.decode(ids, skip_special_tokens=True).lower())
    assert len(words) > 30
    assert sum(word in known for word in words) >= 0.95 * len(words), words
    best, second = logits.topk(2).values.unbind(-1)
    gaps = best - second
    assert gaps.median() > 0.25
    assert gaps.min() > 1e-3


def test_running_python_gives_the_text_and_the_tokenizer_of_the_card(texts):
    if platform.python_version() != TEXT_PYTHON:
        pytest.skip(f"the model was trained on the text of CPython {TEXT_PYTHON}, this is {platform.python_version()}")
    assert text_sha256(texts) == TEXT_SHA256
    trained = train_tokenizer([document.text for document in seen_and_held_out(texts)[0]])
    assert trained.get_vocab() == Tokenizer.from_file(str(FOLDER / "tokenizer.json")).get_vocab()


def test_training_twice_gives_the_same_bits(texts, restored_torch_settings):
    sample = texts[:40]
    tokenizers = [train_tokenizer([document.text for document in sample]) for _ in range(2)]
    assert tokenizers[0].to_str() == tokenizers[1].to_str()
    (first, first_loss), (second, second_loss) = (train(sample, tokenizer, 3) for tokenizer in tokenizers)
    assert first_loss == second_loss
    for (name, weight), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(weight, other), name


def test_sections_lose_nothing_but_blank_lines():
    text = "\n\n".join(f"{number} " + "word " * 99 for number in range(20))
    pieces = sections(text)
    assert len(pieces) > 1
    assert "\n\n".join(pieces).split() == text.split()
    assert max(map(len, pieces)) <= SECTION_CHARACTERS


def test_chats_ask_by_name_and_answer_with_the_first_paragraph():
    question, answer = chat(Document("with", "topic", 'The "with" statement\n***\n\nIt wraps.\n\nMore.'))
    assert question["content"] == "What is the with statement?"
    assert answer["content"] == "It wraps."
    assert chat(Document("walk", "function", "Walk."))[0]["content"] == "Document the function walk."
    assert chat(Document("C.method", "method", "Do.")) is None
    assert chat(Document("_private", "function", "Do.")) is None
