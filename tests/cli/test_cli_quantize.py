"""attribute and requant's trials from the command line: tables for people, one JSON object for machines."""

from __future__ import annotations

from typing import Any

import pytest

FEW = ("--calibration-tokens", 512)


def test_attribute_prints_a_row_per_group_and_answers_from_the_cache(pgolf: Any) -> None:
    command = ("attribute", "--plan", "record-1855", "--by", "layer", "--tokens", 300, "--json", *FEW)
    first = pgolf(*command)
    assert first.code == 0, first.err
    rows = {row["group"]: row for row in first.json["rows"]}
    assert list(rows) == ["block 0", "block 1", "block 2", "outside the blocks", "all"]
    assert "bpb gained" in first.err
    assert first.json["symbols_sha256"]
    again = pgolf(*command)
    assert again.json["cached"]
    assert again.json["rows"] == first.json["rows"]


@pytest.mark.parametrize("wrong", [("--by", "colour"), ("--set", "nothing.clip=3"), ("--codec", "tar")])
def test_attribute_refuses_what_it_does_not_know(pgolf: Any, wrong: tuple[str, str]) -> None:
    assert pgolf("attribute", *wrong, *FEW).code == 2
