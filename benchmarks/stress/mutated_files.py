"""Files of a tiny model are changed at random: an engine starts and answers, or one clear error names the file.

All that a start reads is changed: config.json, generation_config.json, the tokenizer's files, the index of the weights,
engine.json and a schedule file. A seed gives the same changes again; one that broke something is in the result.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from msgspec import to_builtins

from benchmarks.models import checkpoints
from benchmarks.models.tiny_tokenizers import llama3
from nanoflow_backend.bench import result
from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.kv_events import KvEventsConfig
from nanoflow_backend.config.precision import FLOAT32
from nanoflow_backend.engine import LLM, SamplingParams
from nanoflow_backend.engine.engine import Engine
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.schedule.file import Header, ScheduleFile, fingerprint
from nanoflow_backend.schedule.plan import ScheduleError
from nanoflow_backend.schedule.presets import nano_batched, sequential

FILES = {  # and how often each is changed
    "config.json": 8,
    "generation_config.json": 2,
    "tokenizer.json": 3,
    "tokenizer_config.json": 2,
    "special_tokens_map.json": 1,
    "added_tokens.json": 1,
    "chat_template.jinja": 1,
    "model.safetensors.index.json": 2,
    "engine.json": 5,
    "plans.json": 5,
}
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 2**31 - 1, 2**31, 2**63, -(2**63), 10**30,
    0.0, -0.0, 0.5, -1.5, 1e-300, 1e300, "", "0", "1", "\x00", "a\x00b", "../up", "x" * 300, "\ud7ff", "ÿ", "float16",
    [], [0], [-1], [[]], [None], ["x"], {}, {"": 0}, {"a": {"b": []}}, {"rope_type": "linear"}, {"content": "x"},
)  # fmt: skip
TEXTS = (
    b"", b"{", b"{}", b"[]", b"null", b"1e999", b'"x"', b"[" * 2000, b"\xff", b"{{ m[0", b"{% for a in b %}" * 40,
)  # fmt: skip
EXCERPT = 300  # characters of a change that broke something


def main(
    output: Annotated[Path | None, typer.Option(help="Where the JSON result goes; default: standard output.")] = None,
    count: Annotated[int, typer.Option(help="Changed files.")] = 10_000,
    first_seed: Annotated[int, typer.Option("--seed")] = 1,
) -> None:
    """Whether a changed file can break the engine's start; exits with 1 if one can."""
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        ends = run(tiny_model(Path(folder)), count, first_seed)
    broken = {end: n for end, n in ends.items() if end.startswith("broken")}
    result.write({"cases": count, "seconds": round(time.monotonic() - start_s), "ends": dict(ends)}, output)
    sys.exit(bool(broken))


def run(folder: Path, count: int, first_seed: int) -> Counter[str]:
    """How `count` starts end, each with one file of the model in `folder` changed.

    An end is "works", "refused", or "broken ..." with the seed, what was changed and what happened.
    """
    ends: Counter[str] = Counter()
    for seed in range(first_seed, first_seed + count):
        rng = random.Random(seed)
        path = folder / rng.choices(list(FILES), list(FILES.values()))[0]
        content = path.read_bytes()
        path.write_bytes(changed(content, rng))
        try:
            ends[start(folder)] += 1
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # those of the tokenizers' library are no Exceptions
            words = difference(content.decode(), path.read_bytes().decode(errors="replace"))
            ends[f"broken, seed {seed}, {path.name}, {words}: {type(error).__name__}: {error}"[:1000]] += 1
        finally:
            path.write_bytes(content)
    return ends


def start(folder: Path) -> str:
    """Start an engine of the folder and let it answer: "works", or "refused" with a clear error."""
    try:
        llm = LLM(Engine(EngineConfig.load(folder / "engine.json")))
    except (ConfigError, ScheduleError):
        return "refused"
    try:
        (answer,) = llm.generate([[5]], SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True))
        assert answer.token_ids, "an engine that answers nothing"
    finally:
        llm.engine.close()
    return "works"


def changed(content: bytes, rng: random.Random) -> bytes:
    """A file with one change: of a value, a key or, seldom, its text."""
    if not content.startswith(b'{"') or rng.random() < 0.05:
        place = rng.randrange(len(content))
        return rng.choice((rng.choice(TEXTS), content[:place], content[:place] + b"\xff" + content[place + 1 :]))
    tree = json.loads(content)
    holder, key = rng.choice(list(places(tree)))
    how = rng.randrange(8)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder[rng.choice(("unknown", "\x00", str(key) + "s", "rope_scaling", "type"))] = holder[key]
    elif how == 2:
        holder[key] = rng.choice(([holder[key]], {"value": holder[key]}, str(holder[key])))
    elif how == 3 and isinstance(holder[key], int | float):
        holder[key] = rng.choice((-holder[key], holder[key] + 1, holder[key] * 2, float(holder[key]), holder[key] // 2))
    else:
        holder[key] = rng.choice(VALUES)
    return json.dumps(tree).encode()


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON value; of long lists and objects a few."""
    items = list(tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ())
    for key, value in items[:20] + items[20::97]:
        yield tree, key
        yield from places(value)


def difference(before: str, after: str) -> str:
    """The part of a text that was changed, as it is now."""
    first = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), 0)
    return repr(after[max(0, first - 40) : first + EXCERPT])


def tiny_model(folder: Path) -> Path:
    """Every file that a start reads, of a random model that starts in milliseconds."""
    model = checkpoints.make("llama", vocab_size=400, llama3_rope=True)
    checkpoints.save(model, folder, max_shard_size="100KB")
    llama3(folder)
    tokens = {"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|eot_id|>", "special": True}}
    write(folder / "special_tokens_map.json", tokens | {"additional_special_tokens": ["<|end_of_text|>"]})
    tokenizer = json.loads((folder / "tokenizer.json").read_bytes())
    write(folder / "added_tokens.json", {token["content"]: token["id"] for token in tokenizer["added_tokens"]})
    write(folder / "generation_config.json", {"eos_token_id": [1, 2], "bos_token_id": 0, "temperature": 0.6})
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"):
        write(folder / name, json.loads((folder / name).read_bytes()))
    settings = {"dense_batch_tokens": 32, "page_tokens": 4, "kv_cache_tokens": 256, "max_model_tokens": 64}
    defaults = dict(zip(EngineConfig.__struct_fields__[1:], EngineConfig.__struct_defaults__, strict=True))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")
    events = to_builtins(KvEventsConfig(endpoint=f"ipc://{folder}/events", replay_endpoint=f"ipc://{folder}/replay"))
    named = {"model": ".", "device": "cpu", "schedule": "plans.json", "kv_events": events}
    write(folder / "engine.json", {**defaults, **named, **settings})
    layer = build(read_model_config(folder)).layer
    header = Header(
        model_fingerprint=fingerprint(layer), precision=FLOAT32, device="cpu", tensor_parallel=1, dense_batch_tokens=32
    )
    plans = (sequential(layer, 16), nano_batched(layer, 32, 2))
    ScheduleFile(header=header, plans=plans).save(folder / "plans.json")
    assert start(folder) == "works"
    return folder


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))
