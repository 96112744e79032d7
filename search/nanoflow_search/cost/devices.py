"""The device table says what one GPU can do, by the paper's Table 1, data sheets and our own measurements."""

from __future__ import annotations

from dataclasses import dataclass, replace

GB, TFLOP = 1e9, 1e12


@dataclass(frozen=True)
class PowerSpec:
    """The power limits of a GPU. Dynamic energies come on top of static power, which is drawn all the time."""

    cap_w: float
    static_w: float  # drawn with every SM awake and no useful work
    j_per_flop: float  # of a GEMM of 16-bit operands, its own reads and writes included
    j_per_fp8_flop: float  # of a GEMM of e4m3 operands, likewise
    j_per_byte: float  # read from or written to device memory
    j_per_network_byte: float

    def compute_j(self, flop: float, fp8_flop: float) -> float:
        """Return the dynamic energy of products: `flop` of 16-bit operands and `fp8_flop` of e4m3 ones."""
        return flop * self.j_per_flop + fp8_flop * self.j_per_fp8_flop


@dataclass(frozen=True)
class GpuSpec:
    """The rates of one GPU. Network bandwidth is counted one way: half of what data sheets give."""

    name: str
    memory_bytes: float
    memory_bytes_per_s: float
    network_bytes_per_s: float
    flop_per_s: float  # dense, 16-bit operands
    source: str
    fp8_flop_per_s: float | None = None  # dense, e4m3 operands; None: it has no such products
    power: PowerSpec | None = None  # None: its energies are not known

    def compute_s(self, flop: float, fp8_flop: float) -> float:
        """Return the time of products: `flop` of 16-bit operands and `fp8_flop` of e4m3 ones.

        Raises:
            ValueError: the device has no products of e4m3 operands.
        """
        if not fp8_flop:
            return flop / self.flop_per_s
        if self.fp8_flop_per_s is None:
            raise ValueError(f"{self.name}: has no products of FP8 operands")
        return flop / self.flop_per_s + fp8_flop / self.fp8_flop_per_s


def _table_1(
    name: str,
    memory_gb: float,
    memory_gb_per_s: float,
    network_gb_per_s: float,
    tflop_per_s: float,
    has_fp8: bool = True,
) -> GpuSpec:
    """The table has no rates of FP8; data sheets give all that have it twice the 16-bit rate."""
    return GpuSpec(
        name,
        memory_gb * GB,
        memory_gb_per_s * GB,
        network_gb_per_s * GB / 2,
        tflop_per_s * TFLOP,
        "NanoFlow, Table 1",
        2 * tflop_per_s * TFLOP if has_fp8 else None,
    )


_H200 = replace(
    _table_1("H200", 141, 4800, 900, 989), source="data sheet (the paper's Table 1 has 96 GB, which is another GPU)"
)

DEVICES: dict[str, GpuSpec] = {
    device.name: device
    for device in (
        _table_1("A100", 80, 2000, 600, 312, has_fp8=False),
        _table_1("H100", 80, 3352, 900, 989),
        _H200,
        # Sustained rates at the 700 W cap, bf16, random data, measured on one H200: GEMMs of a Llama-3-8B layer
        # (2,048 tokens: 1.340 ms, 0.924 J; in e4m3 with a scale for each row 0.708 ms, 0.500 J), decode attention
        # (3.69 GB: 0.822 ms), a bulk read of the same bytes (0.482 J), NCCL's all-reduce of 4,096 x 8,192 among eight
        # (0.734 ms a pair at 285 W).
        replace(
            _H200,
            name="H200-sustained",
            memory_bytes_per_s=4490 * GB,
            network_bytes_per_s=320 * GB,
            flop_per_s=667 * TFLOP,
            fp8_flop_per_s=1261 * TFLOP,
            source="measured, sustained",
            power=PowerSpec(
                cap_w=700,
                static_w=185,
                j_per_flop=0.757e-12,
                j_per_fp8_flop=0.413e-12,
                j_per_byte=90e-12,
                j_per_network_byte=313e-12,
            ),
        ),
        _table_1("B200", 120, 8000, 1800, 2250),
        _table_1("MI300", 192, 5300, 1024, 1307),
        _table_1("Ada6000", 48, 960, 64, 182),
    )
}

# The time of an operation on e4m3 operands over that of one on 16-bit operands, of products that run sustained.
FP8_TIME = DEVICES["H200-sustained"].compute_s(0, 1) / DEVICES["H200-sustained"].compute_s(1, 0)
