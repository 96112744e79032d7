"""GpuMeter: what the GPU has used so far, by its own counters (NVML)."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import NamedTuple

import torch


class GpuReading(NamedTuple):
    time_s: float  # of time.perf_counter()
    energy_j: float  # since the driver was loaded
    sm_clock_mhz: int
    gpu_percent: int  # of the last moments: how much of the time some kernel ran
    memory_percent: int  # likewise, device memory was read or written


class GpuMeter:
    """The current CUDA device's meter. Reading it does not wait for the device."""

    def __init__(self) -> None:
        import pynvml

        self._nvml = pynvml
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties().uuid
        self._device = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")

    @property
    def name(self) -> str:
        return f"{self._nvml.nvmlDeviceGetName(self._device)}, driver {self._nvml.nvmlSystemGetDriverVersion()}"

    @property
    def power_limit_w(self) -> float:
        return float(self._nvml.nvmlDeviceGetEnforcedPowerLimit(self._device)) / 1e3

    def read(self) -> GpuReading:
        nvml, device = self._nvml, self._device
        used = nvml.nvmlDeviceGetUtilizationRates(device)
        clock = nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_SM)
        energy_j = nvml.nvmlDeviceGetTotalEnergyConsumption(device) / 1e3
        return GpuReading(time.perf_counter(), energy_j, clock, used.gpu, used.memory)


def find_gpu_meter() -> GpuMeter | None:
    """None where there is no GPU, or no nvidia-ml-py."""
    with suppress(ImportError):
        return GpuMeter() if torch.cuda.is_available() else None
    return None
