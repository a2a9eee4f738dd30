"""What a machine does at best, of the calibration in a report's result file: what every rate is a share of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

#: Names of the rows that measure it.
COPY, PRODUCT = "copy", "matrix product"


@dataclass(frozen=True)
class Peaks:
    """Rates; None where the file has none.

    Attributes:
        memory_gb_s: of the largest copy, which fits into no cache, bytes read and written.
        copy_gb_s: of the fastest copy, of memory or of a cache.
        gflop_s: of the fastest matrix product.
    """

    memory_gb_s: float | None = None
    copy_gb_s: float | None = None
    gflop_s: float | None = None

    def of_copy(self, gb_s: float | None) -> float | None:
        """``gb_s`` as a share of the fastest copy."""
        return gb_s / self.copy_gb_s if gb_s and self.copy_gb_s else None

    def of_products(self, gflop_s: float | None) -> float | None:
        """``gflop_s`` as a share of the fastest matrix product."""
        return gflop_s / self.gflop_s if gflop_s and self.gflop_s else None


def peaks(data: dict[str, Any]) -> Peaks:
    """Of a result file, by :func:`benchmarks.store.load`."""
    rows = [row for row in data["rows"] if row.get("section") == "calibration" and row["median_us"]]
    copies = [row for row in rows if row["op"] == COPY]
    products = [row["gflop_s"] for row in rows if row["op"] in (PRODUCT, "linear") and row["mode"] == "inference"]
    return Peaks(
        copies[-1]["gb_s"] if copies else None,  # measured last
        max((row["gb_s"] for row in copies), default=None),
        max(products, default=None),
    )
