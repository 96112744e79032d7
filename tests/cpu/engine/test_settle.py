"""settle decides what a configuration leaves open, and refuses what the model cannot do."""

import msgspec
import pytest
from msgspec.structs import replace
from support.places import DEMO_MODEL

from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.settled import Settled
from nanoflow_backend.engine.settle import settle
from nanoflow_backend.schedule.plan import ScheduleError

CONFIG = EngineConfig(model=str(DEMO_MODEL), device="cpu")


def test_what_is_open_is_decided_by_device_and_model() -> None:
    settled = settle(CONFIG)
    assert (settled.config.device, settled.config.dense_batch_tokens, settled.config.chunk_tokens) == ("cpu", 512, 512)
    assert settled.max_model_tokens == settled.model_config.max_model_tokens


def test_what_is_said_is_kept() -> None:
    settled = settle(replace(CONFIG, max_model_tokens=100, dense_batch_tokens=64, max_running=9))
    assert (settled.max_model_tokens, settled.config.dense_batch_tokens, settled.config.max_running) == (100, 64, 9)
    assert settle(CONFIG).max_model_tokens > 100


def test_what_the_model_cannot_do_is_refused() -> None:
    longest = settle(CONFIG).model_config.max_model_tokens
    with pytest.raises(ConfigError, match=f"max_model_tokens: expected at most {longest} .* got {longest + 1}"):
        settle(replace(CONFIG, max_model_tokens=longest + 1))
    with pytest.raises(ConfigError, match="tensor_parallel: expected a divisor of num_attention_heads"):
        settle(replace(CONFIG, tensor_parallel=8))


def test_other_ranks_get_what_rank_0_has() -> None:
    settled = settle(CONFIG)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(settled), type=Settled) == settled


def test_a_schedule_that_ranks_cannot_follow_is_refused_before_any_starts() -> None:
    with pytest.raises(ScheduleError, match="schedule fast: expected sequential, nano-batched-N"):
        settle(replace(CONFIG, schedule="fast", tensor_parallel=2))
