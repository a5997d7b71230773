"""`make bench` calls every measurement in one process: each returns to it, and none reads its command line."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

BENCHES = sorted((Path(__file__).resolve().parents[2] / "benchmarks").glob("bench_*.py"))


@pytest.mark.parametrize("path", BENCHES, ids=lambda path: path.stem)
def test_main_is_a_plain_function_that_needs_no_argument(path: Path) -> None:
    (main,) = [node for node in ast.parse(path.read_text("utf-8")).body if getattr(node, "name", "") == "main"]
    assert isinstance(main, ast.FunctionDef)
    assert main.decorator_list == []  # a click command would end the process
    assert len(main.args.args) == len(main.args.defaults)
