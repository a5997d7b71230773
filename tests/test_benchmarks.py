"""`make bench` can start: every benchmark is a module with a main() that `python -m benchmarks` calls."""

from __future__ import annotations

import importlib
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted(path.stem for path in (ROOT / "benchmarks").glob("bench_*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_imports_and_has_a_main(name: str) -> None:
    assert callable(importlib.import_module(f"benchmarks.{name}").main)


def test_the_entry_point_runs_all_of_them_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for name in NAMES:
        module = importlib.import_module(f"benchmarks.{name}")
        monkeypatch.setattr(module, "main", lambda name=name: ran.append(name))
    runpy.run_module("benchmarks", run_name="__main__")
    assert ran == NAMES != []
