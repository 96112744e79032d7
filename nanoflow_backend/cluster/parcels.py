"""A parcel is a row with all lines of one task: Ray Data cuts blocks by their bytes, so rows of a line would not do."""

from __future__ import annotations

import pyarrow as pa

from nanoflow_backend.cluster.engine_stage import LINES, RESULTS, EngineStage

ONE_ROW_A_BLOCK = 1  # DataContext.target_max_block_size, in bytes
PARCELS = pa.schema([("first", pa.int64()), ("lines", pa.list_(pa.binary()))])
PARCEL_RESULTS = pa.schema([("results", pa.list_(pa.struct(list(RESULTS))))])


class ParcelStage(EngineStage):
    """An EngineStage whose rows are PARCELS, and then PARCEL_RESULTS; parcels have successive lines."""

    def __call__(self, rows: pa.Table) -> pa.Table:
        numbered = [
            (number, text)
            for first, texts in zip(rows["first"].to_pylist(), rows["lines"].to_pylist(), strict=True)
            for number, text in enumerate(texts, first)
        ]
        numbers, texts = zip(*numbered, strict=True)
        results = super().__call__(pa.table([numbers, texts], schema=LINES))
        return pa.table([[results.to_pylist()]], schema=PARCEL_RESULTS)
