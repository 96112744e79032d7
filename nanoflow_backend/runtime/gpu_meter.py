"""GpuMeter reads what the GPU has used so far, by its own counters (NVML)."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import NamedTuple


class GpuReading(NamedTuple):
    """One reading of a GPU's counters."""

    time_s: float  # of time.perf_counter()
    energy_j: float  # since the driver was loaded
    sm_clock_mhz: int
    gpu_percent: int  # of the last moments: how much of the time some kernel ran
    memory_percent: int  # likewise, device memory was read or written


class GpuMeter:
    """The meter of the first GPU that CUDA programs see here. Reading it does not wait for the GPU, nor need torch."""

    def __init__(self) -> None:
        """Raises: ImportError, without nvidia-ml-py; LookupError, where there is no GPU."""
        import pynvml

        self._nvml = pynvml
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        try:
            pynvml.nvmlInit()
            if first.startswith("GPU-"):
                self._device = pynvml.nvmlDeviceGetHandleByUUID(first)
            else:
                self._device = pynvml.nvmlDeviceGetHandleByIndex(int(first))
        except (pynvml.NVMLError, ValueError) as error:
            raise LookupError(f"CUDA_VISIBLE_DEVICES={first}: {error}") from None

    @property
    def name(self) -> str:
        return f"{self._nvml.nvmlDeviceGetName(self._device)}, driver {self._nvml.nvmlSystemGetDriverVersion()}"

    @property
    def power_limit_w(self) -> float:
        return float(self._nvml.nvmlDeviceGetEnforcedPowerLimit(self._device)) / 1e3

    @property
    def highest_sm_clock_mhz(self) -> float:
        return float(self._nvml.nvmlDeviceGetMaxClockInfo(self._device, self._nvml.NVML_CLOCK_SM))

    def read(self) -> GpuReading:
        """Read the counters now."""
        nvml, device = self._nvml, self._device
        used = nvml.nvmlDeviceGetUtilizationRates(device)
        clock = nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_SM)
        energy_j = nvml.nvmlDeviceGetTotalEnergyConsumption(device) / 1e3
        return GpuReading(time.perf_counter(), energy_j, clock, used.gpu, used.memory)


def find_gpu_meter() -> GpuMeter | None:
    """None where there is no GPU, or no nvidia-ml-py."""
    with suppress(ImportError, LookupError):
        return GpuMeter()
    return None
