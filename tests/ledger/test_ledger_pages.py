"""Pages of notes: cards, leaderboards without borders and drawn trees become one row for each experiment."""

from __future__ import annotations

from pathlib import Path

import pytest

from pgolf_post.ledger import Row
from pgolf_post.ledger.foreign_columns import parse_mark
from pgolf_post.ledger.importing import Imported, ImportSettings, read_log
from pgolf_post.ledger.pages import cut_header, cut_line, key_of, read_records
from pgolf_post.ledger.query import best_rows

PAGE = """2. Phase two

2.1 Leaderboard

Rank Exp Name Base Quant BPB Raw BPB Size Steps Verdict
1 03b wide-mlp (v2) 02 1.2708 1.2642 15.54 MB 1198 ✅ Best
2 02 both from 01 01 1.2900 1.2800 17.30 MB 1196 ❌ Over
3 04 late 02 1.3100 15.00 MB ~1196 ≈ Tie

2.2 Cards

Exp01 — Rerun (reference)

Field Value
Folder exp01_rerun/
Based on the paper
Status Done
Raw BPB 1.3166
Quant BPB 1.3389
Artifact 14.7 MB

Details: Control.

Observations: Still improving.

Exp03b — Wide MLP (from exp02) ⭐ BEST

Field\tValue
Quant BPB\t1.2710 (rounded)

Verdict: ✅ Validated.

2.3 Tree

exp01 (rerun) ──────── quant 1.3389
│
├── exp02_both [❌ NEGATIVE] both
│    → Lesson: none
│     └── exp03b (wide)  quant 1.2708  ⭐ BEST
└── exp05 (designed) 🟡 Never ran

Seed Steps Quantized Artifact (bytes)
42 4989 1.07678 15,909,254
Mean 4979 1.07598 15,907,621
"""
INDEX = """| # | Experiment | Base | Result | Learning |
|---|---|---|---|---|
| 1 | exp01 (rerun) | | Baseline | A gap |
| 2 | exp02 (both) | exp01 | Negative | Too large |
| 3 | exp03b (wide) | exp02 | Positive | |

"""


@pytest.fixture
def log(tmp_path: Path) -> Imported:
    (tmp_path / "page.md").write_text(INDEX + PAGE, encoding="utf-8")
    return read_log(tmp_path / "page.md", ImportSettings())


def named(log: Imported) -> dict[str, Row]:
    return {row.name.split()[0]: row for row in log.rows}


def test_one_row_for_each_experiment_with_what_all_forms_say(log: Imported) -> None:
    rows = named(log)
    assert list(rows) == ["exp01", "exp02", "exp03b", "04", "seed_42", "seed_Mean", "exp05"]
    assert log.rows_in == len(log.rows)
    wide = rows["exp03b"]
    assert wide.result["bpb"] == wide.result["bpb_quantized"] == 1.271  # the card comes first, and the rest is told
    assert wide.settings["disagree"] == [
        "quantized 1.271, 1.2708 in a leaderboard",
        "quantized 1.271, 1.2708 in a tree",
    ]
    assert (wide.result["artifact_bytes"], wide.settings["protocol"]) == (15_540_000, "quantized")
    assert wide.parents == (rows["exp02"].id,)
    assert len(wide.settings["page"]) == 3
    first = rows["exp01"]
    assert (first.result["bpb"], first.result["bpb_unquantized"]) == (1.3389, 1.3166)
    assert (first.settings["base"], first.conclusion) == ("the paper", "A gap")
    assert any("exp03b (wide): quantized 1.271, 1.2708" in line for line in log.declared)


def test_the_best_under_a_budget_is_found(log: Imported) -> None:
    assert [row.name for row in best_rows(log.rows, 16_000_000)] == ["seed_42", "exp03b (wide)", "exp01 (rerun)"]
    assert named(log)["seed_Mean"].result == {"summary": "mean"}


def test_a_line_with_fewer_numbers_than_columns_keeps_them_as_text(log: Imported) -> None:
    late = named(log)["04"]
    assert "bpb" not in late.result
    assert "1.3100 15.00 MB" in late.settings["page"][0]
    assert (late.verdict, late.parents) == ("neutral", (named(log)["exp02"].id,))
    assert any("1 lines of leaderboards have fewer bpb" in line for line in log.declared)


def test_who_hangs_below_whom_is_the_base(log: Imported) -> None:
    planned = named(log)["exp05"]
    assert (planned.parents, planned.verdict) == ((named(log)["exp01"].id,), None)


def test_lines_are_cut_where_most_cells_have_their_shape() -> None:
    columns = cut_header("Exp Description Pre-quant BPB Sliding BPB Artifact Steps Status")
    assert columns == ["exp", "description", "pre-quant bpb", "sliding bpb", "artifact", "steps", "status"]
    cells = cut_line(columns, "exp70 Sped up from exp69 in 2 steps 1.1539 1.1456 15.86 MB 6169 Best of 9")
    expected = ["exp70", "Sped up from exp69 in 2 steps", "1.1539", "1.1456", "15.86 MB", "6169", "Best of 9"]
    assert list(cells.values()) == expected
    assert cut_line(columns, "exp71 Not tried") == {"exp": "exp71", "description": "Not tried"}
    for line in ("Model dim 512", "Outcome Count Examples", "Exp What Why it failed", "Config Steps Quant BPB"):
        assert cut_header(line) is None


def test_names_that_one_tree_has_beside_each_other_stay_apart() -> None:
    tree = "exp70_start\n├── exp70_fast [🟢 POSITIVE]\n└── exp70_slow [🔴 NEGATIVE]\n"
    assert [key_of(record.name) for record in read_records(tree)] == ["exp70_start", "exp70_fast", "exp70_slow"]
    assert {key_of(name) for name in ("54b", "exp54b (x)", "Exp54b")} == {"exp54b"}


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("✅ Best", "positive"),
        ("quant 1.3 ✗✗", "negative"),
        ("🟡 Never ran", None),
        ("≈ Tie", "neutral"),
        ("Best", None),
    ],
)
def test_marks_are_verdicts(text: str, verdict: str | None) -> None:
    assert parse_mark(text) == verdict
