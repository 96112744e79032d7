"""settle turns a configuration into what an engine runs on this machine, with everything decided that it left open."""

from __future__ import annotations

from msgspec.structs import replace

from nanoflow_backend.config.engine_config import EngineConfig, SettledConfig
from nanoflow_backend.config.settled import Settled
from nanoflow_backend.engine.auto_schedule import find_auto_schedule
from nanoflow_backend.engine.settled_on import settled_on
from nanoflow_backend.models.computed import read_computed
from nanoflow_backend.models.model import build
from nanoflow_backend.runtime.device import find_device, find_kind, show_only
from nanoflow_backend.runtime.rank_gpu import check_gpus
from nanoflow_backend.schedule.source import find_schedules, named_dense_batch_tokens


def settle(config: EngineConfig, eos_id: int | None = None) -> Settled:
    """Choose GPUs, device, schedule, batch size, collectives and context length, in this order.

    `config.gpus` decides which GPUs this process and its children see from now on, so nothing may have touched a GPU
    before. With the schedule "auto" it may search for one, which takes minutes.

    Args:
        eos_id: the tokenizer's. Generation ends there too, as vLLM has it: chat fine-tunes of base models often name
            the end of a turn in tokenizer_config.json alone.

    Raises:
        ConfigError: naming the field, or the file of the model's folder, and what was expected.
        ScheduleError: the schedule file cannot be read, or does not fit the ranks.
    """
    if config.gpus is not None:
        show_only(config.gpus)
    device = find_device(config.device)
    config, model_config = read_computed(config, device.kind)
    config = find_auto_schedule(config, device)
    config = replace(config, dense_batch_tokens=named_dense_batch_tokens(config))
    settled = config.settle(device.kind)
    if settled.tensor_parallel > 1 and device.kind == "cuda":
        settled = replace(settled, collectives=check_gpus(settled))
    if eos_id is not None and eos_id < model_config.vocab_size and eos_id not in model_config.eos_token_ids:
        model_config = replace(model_config, eos_token_ids=(*model_config.eos_token_ids, eos_id))
    model = build(model_config, settled.tensor_parallel)  # says what the ranks cannot share, before any of them starts
    if settled.tensor_parallel > 1:  # else the one rank says so itself
        find_schedules(settled, model, device.name, device.sms)
    return Settled(settled, model_config)


def settled_here(config: EngineConfig) -> SettledConfig:
    """The configuration as an engine of this machine will have it, but for its schedule: found without making one.

    Raises:
        ConfigError: what can be seen to be wrong with it, or with the model's config.json.
    """
    # Where GPUs are named, CUDA must not be touched before the engine has chosen among them.
    return settled_on("cuda" if config.gpus is not None else find_kind(config.device), config)
