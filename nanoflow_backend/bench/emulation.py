"""Emulation is rank 0 of a tensor-parallel group alone on one device, beside a clock in place of the other ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec.structs import replace
from nanoflow_kernels import reference

from nanoflow_backend.bench import result
from nanoflow_backend.commands.settings import engine_config, parse
from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.network_table import NetworkHeader, NetworkTable
from nanoflow_backend.config.settled import Settled
from nanoflow_backend.engine import Engine
from nanoflow_backend.engine.local_executor import LocalExecutor
from nanoflow_backend.engine.program_builder import find_kernels
from nanoflow_backend.engine.settle import settle
from nanoflow_backend.runtime.collectives.emulated import Emulated
from nanoflow_backend.runtime.device import find_device

ASSUMED_SMS = 8  # of collectives that take an assumed rate
TOKENS_ARE = (
    "meaningless: weights are random, and the other ranks' rows are made of this rank's; rates count them as if all "
    "ranks were there"
)
ENERGY_IS = "of this device alone, without its links (link_pj_per_byte) and without waiting for late ranks (rank_skew)"


@dataclass(frozen=True)
class Emulation:
    """What `--emulate-tp` asks for. It is an option of measurements alone: engine.json has none."""

    network: NetworkTable

    @classmethod
    def asked_for(cls, ranks: int | None, network: Path | None, gb_per_s: float | None) -> Emulation | None:
        """The emulation of `ranks` ranks on the network of a table, or at a rate in place of its times.

        Raises:
            ConfigError: an option without those it needs; a table that is wrong, of other ranks, or that does not say
                what an emulation lacks.
        """
        if ranks is None:
            if network is not None or gb_per_s is not None:
                option = "--network" if network is not None else "--network-gb-per-s"
                raise ConfigError(f"{option}: expected none without --emulate-tp")
            return None
        if network is None:
            raise ConfigError("--emulate-tp: expected --network, a table of what collectives take")
        if gb_per_s is not None and not 0 < gb_per_s < math.inf:
            raise ConfigError(f"--network-gb-per-s: expected a finite number above 0, got {gb_per_s:g}")
        table = NetworkTable.load(network)
        if table.header.ranks != ranks:
            raise ConfigError(f"--emulate-tp: expected {table.header.ranks}, the ranks of {network}, got {ranks}")
        if table.header.link_pj_per_byte is None or table.header.rank_skew is None:
            raise ConfigError(f"{network}: header: expected link_pj_per_byte and rank_skew, which an emulation lacks")
        return cls(table if gb_per_s is None else at_rate(table.header, gb_per_s))

    def make_engine(self, model: Path, settings: Sequence[str], **defaults: Any) -> Engine:
        """An engine of rank 0 alone.

        Raises:
            ConfigError: as those of all engines; settings that an emulation does not have.
        """
        for name in ("tensor_parallel", "hosts"):
            if name in parse(settings):
                raise ConfigError(f"--set {name}: expected none beside --emulate-tp")
        config = engine_config(model, settings, load_format="dummy", **defaults)
        if config.load_format != "dummy":
            raise ConfigError(f"load_format: expected dummy beside --emulate-tp, got {config.load_format}")
        if config.schedule == "auto":
            raise ConfigError("schedule: expected a preset or a schedule file beside --emulate-tp, got auto")
        return Engine(config, make_executor=self._make_executor, settle=self._settle)

    def engine_facts(self, engine: Engine) -> dict[str, Any]:
        """What a result says of the emulation and of its engine."""
        found, config = result.engine_facts(engine), engine.config
        way = f"TP {config.tensor_parallel} over {config.collectives} on "
        alone = f"rank 0 of TP {config.tensor_parallel} alone, emulated, on "
        return self.facts() | found | {"engine_is": found["engine_is"].replace(way, alone)}

    def facts(self) -> dict[str, Any]:
        """What every result says of it."""
        header = self.network.header
        return {
            "emulated": {
                "ranks": header.ranks,
                "rank": 0,
                "network": header.name,
                "source": header.source,
                "link_pj_per_byte": list(header.link_pj_per_byte or ()),
                "rank_skew": list(header.rank_skew or ()),
                "energy_is": ENERGY_IS,
                "tokens_are": TOKENS_ARE,
            }
        }

    def _make_executor(self, settled: Settled, on_rank_death: Callable[[str], None]) -> LocalExecutor:
        kernels = find_kernels(find_device(settled.config.device)) or reference
        return LocalExecutor(settled, on_rank_death, Emulated(self.network, kernels))

    def _settle(self, config: EngineConfig, eos_id: int | None) -> Settled:
        """As an engine of one rank, on the one device that is there; then with the shapes of a rank of the group."""
        settled = settle(config, eos_id)
        shard = replace(settled.config, tensor_parallel=self.network.header.ranks, gpus=None)
        return Settled(shard, settled.model_config)


def at_rate(header: NetworkHeader, gb_per_s: float) -> NetworkTable:
    """The network of `header` with collectives that take a rate on ASSUMED_SMS."""
    name = f"assumed: {gb_per_s:g} GB/s on {ASSUMED_SMS} SMs"
    assumed = replace(header, name=name, source=f"assumed; ranges as of {header.name}: {header.source}")
    return NetworkTable.at_rate(assumed, ASSUMED_SMS, gb_per_s)
