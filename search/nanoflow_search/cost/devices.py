"""The device table says what one GPU can do, by the paper's Table 1, data sheets and our own measurements."""

from __future__ import annotations

from dataclasses import dataclass, replace

GB, TFLOP = 1e9, 1e12


@dataclass(frozen=True)
class PowerSpec:
    """The power limits of a GPU. Dynamic energies come on top of static power, which is drawn all the time."""

    cap_w: float
    static_w: float  # drawn with every SM awake and no useful work
    j_per_flop: float  # of a GEMM, its own reads and writes included
    j_per_byte: float  # read from or written to device memory
    j_per_network_byte: float


@dataclass(frozen=True)
class GpuSpec:
    """The rates of one GPU. Network bandwidth is counted one way: half of what data sheets give."""

    name: str
    memory_bytes: float
    memory_bytes_per_s: float
    network_bytes_per_s: float
    flop_per_s: float  # dense, 16-bit operands
    source: str
    power: PowerSpec | None = None  # None: its energies are not known


def _table_1(
    name: str, memory_gb: float, memory_gb_per_s: float, network_gb_per_s: float, tflop_per_s: float
) -> GpuSpec:
    return GpuSpec(
        name,
        memory_gb * GB,
        memory_gb_per_s * GB,
        network_gb_per_s * GB / 2,
        tflop_per_s * TFLOP,
        "NanoFlow, Table 1",
    )


_H200 = replace(
    _table_1("H200", 141, 4800, 900, 989), source="data sheet (the paper's Table 1 has 96 GB, which is another GPU)"
)

DEVICES: dict[str, GpuSpec] = {
    device.name: device
    for device in (
        _table_1("A100", 80, 2000, 600, 312),
        _table_1("H100", 80, 3352, 900, 989),
        _H200,
        # Sustained rates at the 700 W cap, bf16, random data, measured on one H200: GEMMs of a Llama-3-8B layer
        # (2,048 tokens: 1.340 ms, 0.924 J), decode attention (3.69 GB: 0.822 ms), a bulk read of the same bytes
        # (0.482 J), NCCL's all-reduce of 4,096 x 8,192 among eight (0.734 ms a pair at 285 W).
        replace(
            _H200,
            name="H200-sustained",
            memory_bytes_per_s=4490 * GB,
            network_bytes_per_s=320 * GB,
            flop_per_s=667 * TFLOP,
            source="measured, sustained",
            power=PowerSpec(
                cap_w=700, static_w=185, j_per_flop=0.757e-12, j_per_byte=90e-12, j_per_network_byte=313e-12
            ),
        ),
        _table_1("B200", 120, 8000, 1800, 2250),
        _table_1("MI300", 192, 5300, 1024, 1307),
        _table_1("Ada6000", 48, 960, 64, 182),
    )
}
