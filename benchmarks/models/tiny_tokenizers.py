"""Tiny tokenizers are trained on a few lines and saved in the exact shape of well-known ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "Pages are freed only after the step that may still write them. It's 12345 tokens!",
    "Größe, naïve café, señor; Привет, как дела? 你好, 世界。こんにちは 😀 👩\u200d👩\u200d👧",
    "\n\n\tdef f(x):\n        return x + 1\n",
    "stop stops stopping at the end of the story, and so on and so on",
] * 3

_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = _SPLIT % r"\p{N}{1,3}"
QWEN2_SPLIT = _SPLIT % r"\p{N}"


def llama3(folder: Path) -> Path:
    """ByteLevel BPE; the post-processor adds BOS."""
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = _byte_level_bpe(LLAMA3_SPLIT, specials)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A",
                special_tokens=[("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))],
            ),
        ]
    )
    return _save(tokenizer, folder, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")


def qwen2(folder: Path) -> Path:
    """ByteLevel BPE after NFC, no BOS; also an added token that is not special."""
    tokenizer = _byte_level_bpe(QWEN2_SPLIT, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False)])
    return _save(
        tokenizer,
        folder,
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        add_bos_token=False,
    )


def deepseek(folder: Path) -> Path:
    """ByteLevel BPE whose BOS is only in the config, as deepseek-llm-67b's (whose bars are not ASCII)."""
    bos, eos = "<\uff5cbegin▁of▁sentence\uff5c>", "<\uff5cend▁of▁sentence\uff5c>"
    tokenizer = _byte_level_bpe(LLAMA3_SPLIT, [bos, eos])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    named = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False, "__type": "AddedToken"}
    return _save(
        tokenizer, folder, bos_token={**named, "content": bos}, eos_token={**named, "content": eos}, add_bos_token=True
    )


def llama2(folder: Path, corpus: Sequence[str] = CORPUS, vocab_size: int = 200) -> Path:
    """SentencePiece BPE with byte fallback, as transformers writes Llama-2's: no pre-tokenizer at all."""
    training = Tokenizer(models.BPE())
    training.pre_tokenizer = pre_tokenizers.Metaspace()
    latin = [line for line in corpus if line.isascii()]  # so that other scripts need byte fallback
    training.train_from_iterator(latin, trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False))
    trained = json.loads(training.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(trained["vocab"])]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[tuple(merge) for merge in trained["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _save(
        tokenizer, folder, bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=True, add_eos_token=False
    )


SHAPES = {"llama3": llama3, "qwen2": qwen2, "deepseek": deepseek, "llama2": llama2}


def _byte_level_bpe(split: str, specials: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(special, normalized=False) for special in specials])
    return tokenizer


def _save(tokenizer: Tokenizer, folder: Path, **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def bytes_only(folder: Path, extra: Sequence[str] = ()) -> Path:
    """A token for each byte, then <end>, which is EOS, then `extra` special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in ("<end>", *extra)])
    return _save(tokenizer, folder, eos_token="<end>")
