"""`make bench`: run every bench_*.py here and print its ratios. Measurements, not tests: no number fails anything."""

from __future__ import annotations

import importlib
from pathlib import Path

if __name__ == "__main__":
    for path in sorted(Path(__file__).parent.glob("bench_*.py")):
        importlib.import_module(f"benchmarks.{path.stem}").main()
