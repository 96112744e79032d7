"""Train the demo model: a tiny Llama that writes in the style of Python's documentation (demo/corpus.py).

python -m demo.train                    # about 25 minutes on one core; writes demo/tiny-llama
python -m demo.train --check            # trains again, says how the result differs from demo/tiny-llama
"""

import hashlib
import json
import math
import platform
import random
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import jinja2
import tokenizers
import torch
import transformers
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file

from demo.corpus import TEXT_PYTHON, TEXT_SHA256, Document, chat, documents, sections, text_sha256

FOLDER = Path(__file__).parent / "tiny-llama"

BEGIN, END, TURN_END = "<|begin|>", "<|end|>", "<|turn_end|>"
ROLES = ("system", "user", "assistant")
SPECIAL_TOKENS = [BEGIN, END, TURN_END, *(f"<|{role}|>" for role in ROLES)]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|turn_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SYSTEM_PROMPT = "You explain Python."
VOCABULARY = 2011  # prime, so not a multiple of any tile

SEED = 0
STEPS = 5000
STEP_TOKENS = 1024
ROW_TOKENS = (256, 256, 256, 1024)  # by turns: mostly short rows, some long ones so that long texts stay stable
PEAK_LEARNING_RATE, WARMUP_STEPS = 1e-2, 100
EPOCH_CHATS = 0.5  # share of the chats that an epoch shows: 8 % of its tokens

FACTS_BEGIN, FACTS_END = "<!-- facts: written by train.py -->", "<!-- end of facts -->"


def seen_and_held_out(texts: list[Document]) -> tuple[list[Document], list[Document]]:
    """Return the texts to train on, and every 50th."""
    return [document for index, document in enumerate(texts) if index % 50], texts[::50]


def train_tokenizer(texts: list[str]) -> tokenizers.Tokenizer:
    """Train a byte-level BPE tokenizer that puts BEGIN before every text."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    return tokenizer


def epoch_ids(texts: list[Document], tokenizer: tokenizers.Tokenizer, chooser: random.Random) -> list[int]:
    """Return one shuffled pass over the texts as a stream of ids: BEGIN text END, and some of the chats."""
    samples = [section + END for document in texts for section in sections(document.text)]
    template = jinja2.Template(CHAT_TEMPLATE)
    for messages in filter(None, map(chat, texts)):
        if chooser.random() < EPOCH_CHATS:
            if chooser.random() < 0.2:
                messages.insert(0, {"role": "system", "content": SYSTEM_PROMPT})
            samples.append(template.render(messages=messages))  # BEGIN comes from the tokenizer, as for every sample
    chooser.shuffle(samples)
    return [token for encoding in tokenizer.encode_batch(samples) for token in encoding.ids]


def batches(texts: list[Document], tokenizer: tokenizers.Tokenizer, steps: int) -> Iterator[torch.Tensor]:
    """Yield `steps` int64 tensors [rows, row tokens] of STEP_TOKENS tokens in all."""
    chooser = random.Random(SEED)
    stream: list[int] = []
    for step in range(steps):
        if len(stream) < STEP_TOKENS:
            stream += epoch_ids(texts, tokenizer, chooser)
        ids, stream = stream[:STEP_TOKENS], stream[STEP_TOKENS:]
        yield torch.tensor(ids).view(-1, ROW_TOKENS[step % len(ROW_TOKENS)])


def new_model(tokenizer: tokenizers.Tokenizer) -> transformers.LlamaForCausalLM:
    """Return the untrained model, fp32."""
    torch.manual_seed(SEED)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(BEGIN),
        eos_token_id=[tokenizer.token_to_id(END), tokenizer.token_to_id(TURN_END)],
    )
    return transformers.LlamaForCausalLM(config)


def learning_rate(step: int) -> float:
    """Return the rate of one step: a linear rise, then a cosine to zero at STEPS."""
    rise = min(1.0, (step + 1) / WARMUP_STEPS)
    return PEAK_LEARNING_RATE * rise * 0.5 * (1 + math.cos(math.pi * step / STEPS))


def train(
    texts: list[Document], tokenizer: tokenizers.Tokenizer, steps: int
) -> tuple[transformers.LlamaForCausalLM, float]:
    """Return the model after `steps` steps, fp32, and the mean loss (nats per token) of the last 100 of them."""
    torch.set_num_threads(1)  # the order of additions, and so every bit, depends on the number of threads
    torch.use_deterministic_algorithms(True)
    model = new_model(tokenizer)
    matrices = list(model.model.layers.parameters())
    optimizers = [
        torch.optim.Muon(
            [weight for weight in matrices if weight.ndim == 2], weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(
            [weight for weight in model.parameters() if weight.ndim != 2 or weight.shape[0] == VOCABULARY],
            betas=(0.9, 0.95),
            weight_decay=0.0,
        ),
    ]
    losses: list[float] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=steps)
        for step, ids in enumerate(batches(texts, tokenizer, steps)):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            recent = losses[-100:]
            progress.update(task, advance=1, description=f"training, loss {sum(recent) / len(recent):.3f}")
    return model.eval(), sum(recent) / len(recent)


@torch.inference_mode()
def held_out_loss(model: torch.nn.Module, texts: list[Document], tokenizer: tokenizers.Tokenizer) -> float:
    """Return the mean loss (nats per token) on texts that the model has not seen, in rows of 256 tokens."""
    ids = [token for document in texts for token in tokenizer.encode(document.text + END).ids]
    rows = torch.tensor(ids[: len(ids) // 256 * 256]).view(-1, 256)
    return sum(model(input_ids=row[None], labels=row[None]).loss.item() for row in rows) / len(rows)


def save(model: transformers.LlamaForCausalLM, tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    """Write the model in bf16 and the tokenizer as a Hugging Face folder."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "model_max_length": model.config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")


def write_facts(folder: Path, facts: dict[str, object]) -> None:
    """Replace the table of facts in the folder's model card (made if it is missing)."""
    for path in sorted(folder.iterdir()):
        if path.name != "README.md":
            facts[f"sha256 of {path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())])
    card = folder / "README.md"
    before, _, after = (card.read_text() if card.exists() else "").partition(FACTS_BEGIN)
    card.write_text(f"{before}{FACTS_BEGIN}\n{table}\n{FACTS_END}{after.partition(FACTS_END)[2]}")


def compare(folder: Path, other: Path) -> None:
    """Print which files of two folders are the same, and how far the weights are apart."""
    for path in sorted(folder.iterdir()):
        if path.name != "README.md":
            same = path.read_bytes() == (other / path.name).read_bytes()
            print(f"{path.name}: {'the same bytes' if same else 'DIFFERENT'}")
    weights, others = (load_file(path / "model.safetensors") for path in (folder, other))
    for name, weight in weights.items():
        if not torch.equal(weight, others[name]):
            apart = (weight.float() - others[name].float()).norm() / others[name].float().norm()
            print(f"{name}: relative RMS difference {apart:.2e}")


def main(output: Path = FOLDER, steps: int = STEPS, check: bool = False, any_text: bool = False) -> None:
    """Train the demo model into --output, or --check that training again gives the committed files."""
    texts = documents()
    sha256 = text_sha256(texts)
    print(f"text of CPython {platform.python_version()}: {len(texts)} documents, sha256 {sha256}")
    if sha256 != TEXT_SHA256 and not any_text:
        raise SystemExit(
            f"This is not the text of CPython {TEXT_PYTHON} (sha256 {TEXT_SHA256}), so the model would be another one. "
            f"Run CPython {TEXT_PYTHON} with its whole standard library, or accept another model with --any-text."
        )
    seen, held_out = seen_and_held_out(texts)
    tokenizer = train_tokenizer([document.text for document in seen])
    model, loss = train(seen, tokenizer, steps)
    facts: dict[str, object] = {
        "text": f"CPython {platform.python_version()}, {len(texts)} documents, every 50th held out",
        "sha256 of the text": sha256,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "vocabulary": tokenizer.get_vocab_size(),
        "training": f"{steps} steps of {STEP_TOKENS} tokens, seed {SEED}, one thread",
        "loss on the last 100 steps": f"{loss:.3f} nats per token",
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if check else output
        save(model, tokenizer, folder)
        facts["loss on held-out text, bf16 weights"] = f"{held_out_loss(model, held_out, tokenizer):.3f} nats per token"
        facts["versions"] = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "tokenizers"))
        facts["processor"] = torch.backends.cpu.get_cpu_capability()
        write_facts(folder, facts)
        print((folder / "README.md").read_text())
        if check:
            compare(folder, output)


if __name__ == "__main__":
    typer.run(main)
