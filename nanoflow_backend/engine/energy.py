"""TokenEnergy says what a token costs at the moment, from the device's energy counter."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from nanoflow_backend.process.ticker import Ticker
from nanoflow_backend.runtime.gpu_meter import find_gpu_meter

if TYPE_CHECKING:
    from nanoflow_backend.engine.engine import Engine

log = logging.getLogger(__name__)
PERIOD_S = 0.1  # NVML's counter moves every 20 to 100 ms


class TokenEnergy:
    """What the device used since the last look, over the tokens that were launched since. Idle time costs no request.

    The host launches a step ahead, and a look sees what the counter saw up to 0.1 s before: over a request of seconds
    that is little, over a shorter one the result is an estimate.

    Args:
        read_energy_j: the device's counter.
        computed_tokens: of all steps so far.
    """

    def __init__(self, read_energy_j: Callable[[], float], computed_tokens: Callable[[], int]) -> None:
        self._read_energy_j, self._computed_tokens = read_energy_j, computed_tokens
        self._energy_j, self._tokens = read_energy_j(), computed_tokens()

    def of_a_token_j(self) -> float | None:
        """None where nothing was launched since the last look."""
        energy_j, tokens = self._read_energy_j(), self._computed_tokens()
        used_j, done = energy_j - self._energy_j, tokens - self._tokens
        self._energy_j, self._tokens = energy_j, tokens
        return used_j / done if done else None


def measure_energy(engine: Engine) -> Ticker | None:
    """From now on tell the engine's observer, from a thread of its own. None where no GPU tells us."""
    try:
        meter = find_gpu_meter() if engine.executor.device.kind == "cuda" else None
        if meter is None:
            return None
        energy = TokenEnergy(lambda: meter.read().energy_j, lambda: engine.scheduler.observer.observed.computed_tokens)
    except Exception as error:  # such as a GPU that is shared in parts: no reason not to serve
        log.warning("requests have no energy: %s: %s", type(error).__name__, error)
        return None

    def tell() -> None:
        if (token_energy_j := energy.of_a_token_j()) is not None:
            engine.scheduler.observer.token_energy_j = token_energy_j

    return Ticker("energy", PERIOD_S, tell)
