"""Older logs: rows in = rows out, no cell lost, lineage by base, and everything that was guessed is said."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgolf_post.errors import DamagedFileError, MismatchError, NotFoundError, SettingsError
from pgolf_post.ledger import Ledger, Row
from pgolf_post.ledger.exporting import to_csv, to_jsonl, to_markdown
from pgolf_post.ledger.foreign_columns import parse_bytes, parse_number, parse_verdict
from pgolf_post.ledger.importing import Imported, ImportSettings, read_log, require_rows
from pgolf_post.ledger.lineage import trees
from pgolf_post.ledger.query import best_rows
from pgolf_post.ledger.tables import find_tables

INDEX = """
# Complete index

| # | Experiment | Base | Motivation | Result | Learning |
|---|:--|---|---|:-:|---|
| **Phase one** | | | | | |
| 1 | try00 (rerun) | paper | Establish a baseline | Baseline | Gap of 0.02 \\| biased |
| 2 | try01 (short-warmup) | try00 | Warm up for 20 steps | Negative | Slower |
| **Phase two** | | | | | |
| 3 | try02 (wide-mlp) | try00 | Wider MLP | **Positive** | Bytes grow |
| 4 | try02_alt | 3 | The same, narrower | Neutral | |
| 5 | try03 (both) | try01 + try02 | Together | NO-OP | Identical symbols |
| 6 | try04 | PR #99 | Port | Not run | |
"""

RENDERED = """Complete index of everything that was tried.

# Experiment Base Motivation Result Learning
Phase one
1 try00 (rerun) paper Establish a baseline Baseline Gap of 0.02; 1.3 bpb
2 try01 (short warmup) try00 Warm up for 20 steps Negative Slower
Phase two
3 try02 PR #99 Port of the Positive idea, narrowed Not run
4 something unlike the others

Last updated: yesterday
"""

WAVES = """
Wave one, 240 steps
| # | Experiment | Description | BPB | Delta | Status |
|---|---|---|---|---|---|
| A1 | Smooth | Label smoothing | 1.6282 | +0.017 | Worse |
| A2 | Tidal | Golden warm-up | 1.5906 | −0.021 | Winner |
| A3 | Skip | — | — | — | CRASH: compile |
Conclusion: Tidal.
Wave two
| # | Experiment | Description | BPB | Steps | Delta vs A2 | Status |
|---|---|---|---|---|---|---|
| B1 | Wide | 1 head | 1.5800 | 260 | -0.011 | New best |
| # | Experiment | Description | BPB | Steps | Delta vs baseline | Status |
|---|---|---|---|---|---|---|
| B2 | Wide again | rerun | 1.5802 | 259 | -0.030 | Neutral |
"""

MASTER = """# Master log
## Training Runs
| Date | Run ID / Model Type | Machine | Git Tag | Conclusion / Takeaway |
|---|---|---|---|---|
| 2026-01-17 | `run_a_20260117` | Big | `54ee870` | **Good** start |
| 2026-01-18 | `run_b_20260118` | Small | — | Diverged |

## Evaluation (zero training cost)

| Date | Eval Type | Source Checkpoint | Conclusion |
|---|---|---|---|
| 2026-01-20 | `decoder` (Via) | `run_b_20260118` (from the hub) | Better than before |
"""


def imported(tmp_path: Path, text: str, name: str = "log.md", **settings: object) -> Imported:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return read_log(path, ImportSettings(**settings))


def cells_kept(row: Row) -> set[str]:
    return {str(value) for value in (*row.settings.values(), row.name, row.conclusion)}


def test_an_index_keeps_its_rows_sections_verdicts_and_lineage(tmp_path):
    log = imported(tmp_path, INDEX)
    assert log.rows_in == len(log.rows) == 6
    named = {row.name.split()[0]: row for row in log.rows}
    assert [row.verdict for row in log.rows] == [None, "negative", "positive", "neutral", "no-op", None]
    assert [row.settings["section"] for row in log.rows] == ["Phase one"] * 2 + ["Phase two"] * 4
    assert named["try00"].conclusion == "Gap of 0.02 | biased"
    assert named["try00"].parents == ("external:paper",)
    assert named["try01"].parents == (named["try00"].id,)
    assert named["try02_alt"].parents == (named["try02"].id,)  # by number
    assert named["try03"].parents == (named["try01"].id, named["try02"].id)
    assert named["try04"].parents == ("external:PR #99",)
    assert [len(list(root.walk())) for root in trees(log.rows)] == [6, 2]
    assert "name ← 'Experiment'" in log.declared[0]
    assert "paper (1), PR #99 (1)" in log.declared[-1]


def test_a_table_that_lost_its_borders_is_cut_by_its_columns_kinds(tmp_path):
    log = imported(tmp_path, RENDERED, "page.txt")
    assert log.rows_in == len(log.rows) == 4
    first, second, third, odd = log.rows
    assert (first.name, first.settings["base"]) == ("try00 (rerun)", "paper")
    assert (second.name, second.verdict, second.conclusion) == ("try01 (short warmup)", "negative", "Slower")
    assert second.parents == (first.id,)
    assert (third.settings["base"], third.settings["section"]) == ("PR #99", "Phase two")
    assert odd.name == "something unlike the others"
    assert any("could not be cut, kept whole as names: 4" in line for line in log.declared)


def test_numbers_verdicts_and_bases_of_difference_columns(tmp_path):
    log = imported(tmp_path, WAVES)
    smooth, tidal, skipped, wide, again = log.rows
    assert (smooth.result, smooth.verdict) == ({"bpb": 1.6282, "delta_bpb": 0.017}, "negative")
    assert (tidal.result["delta_bpb"], tidal.verdict) == (-0.021, "positive")
    assert skipped.result == {"error": "CRASH: compile"}
    assert wide.parents == (tidal.id,)
    assert wide.settings["Steps"] == "260"
    assert again.parents == ("external:baseline",)
    assert [table.title for table in log.tables] == ["Wave one, 240 steps", "Wave two", "Wave two (2)"]


def test_runs_and_the_evaluations_of_their_checkpoints(tmp_path):
    first, second, score = imported(tmp_path, MASTER).rows
    assert [first.kind, second.kind, score.kind] == ["run", "run", "score"]
    assert (first.name, first.device, first.commit) == ("run_a_20260117", "Big", "54ee870")
    assert (first.created, first.conclusion) == ("2026-01-17T00:00:00.000+00:00", "**Good** start")
    assert score.parents == (second.id,)


def test_tables_are_chosen_by_number_and_a_missing_one_is_named(tmp_path):
    assert [row.name for row in imported(tmp_path, WAVES, tables="2,3").rows] == ["Wide", "Wide again"]
    with pytest.raises(NotFoundError, match="tables 1 to 3, not 4"):
        imported(tmp_path, WAVES, tables="4")
    with pytest.raises(SettingsError, match="--table 'two'"):
        imported(tmp_path, WAVES, tables="two")


def test_a_mapping_overrules_and_must_name_what_is_there(tmp_path):
    text = "Exp;Idea;From;Final\n7;seven;;1.25\n8;eight;7;1.20\n"
    log = imported(tmp_path, text, "notes.csv", mapping="number=Exp,name=Idea,base=From,bpb=Final")
    assert [(row.name, row.result) for row in log.rows] == [("seven", {"bpb": 1.25}), ("eight", {"bpb": 1.2})]
    assert log.rows[1].parents == (log.rows[0].id,)
    with pytest.raises(SettingsError, match="no chosen table has Nowhere; columns: Exp, Idea, From, Final"):
        imported(tmp_path, text, "notes.csv", mapping="base=Nowhere")
    with pytest.raises(SettingsError, match="a field of number, name, base"):
        imported(tmp_path, text, "notes.csv", mapping="colour=Exp")


def test_the_same_log_twice_is_the_same_rows_and_an_edited_one_a_mismatch(tmp_path):
    with Ledger.open(tmp_path) as ledger:
        assert ledger.add_all(imported(tmp_path, INDEX).rows) == 6
        assert ledger.add_all(imported(tmp_path, INDEX).rows) == 0
        edited = imported(tmp_path, INDEX.replace("Slower", "Slower, really")).rows
        with pytest.raises(MismatchError, match="Slower, really"):
            ledger.add_all(edited)
        ledger.add_all(edited, replace=True)
        assert [row.conclusion for row in ledger.rows() if row.name.startswith("try01")] == ["Slower, really"]


def test_repeated_numbers_and_names_stay_different_rows(tmp_path):
    log = imported(
        tmp_path, "| # | Name |\n|---|---|\n| 1 | a |\n| 1 | a |\n\ntext\n\n| # | Name |\n|---|---|\n| 1 | a |\n"
    )
    assert len({row.id for row in log.rows}) == log.rows_in == 3


def test_rows_wider_or_narrower_than_the_header_lose_nothing(tmp_path):
    wide, narrow = imported(tmp_path, "| # | Name |\n|---|---|\n| 1 | a | more | and more |\n| 2 |\n").rows
    assert {wide.settings["column 3"], wide.settings["column 4"]} == {"more", "and more"}
    assert narrow.settings["number"] == "2"


def test_rows_of_dashes_are_rows_and_a_new_header_starts_a_new_table():
    text = "| # | Name |\n|-|-|\n| 1 | a |\n| - | - |\n| 2 | b |\n| No | What |\n|---|---|\n| 3 | c |\n"
    assert [table.rows for table in find_tables(text)] == [(("1", "a"), ("-", "-"), ("2", "b")), (("3", "c"),)]


def test_seconds_become_dollars_where_no_cost_is_known(tmp_path):
    table = "| Name | Seconds | Cost |\n|---|---|---|\n| a | 1800 | |\n| b | 1800 | 3.5 |\n| c | | |\n"
    rows = imported(tmp_path, table, dollars_per_hour=20.0).rows
    assert [row.cost_dollars for row in rows] == [10.0, 3.5, None]
    unpriced = imported(tmp_path, table).rows
    assert [
        row.cost_dollars for row in imported(tmp_path, to_jsonl(unpriced), "r.jsonl", dollars_per_hour=2.0).rows
    ] == [
        1.0,
        3.5,
        None,
    ]


def test_what_holds_no_table_says_so(tmp_path):
    with pytest.raises(NotFoundError, match="holds no table"):
        imported(tmp_path, "just words | and a pipe\n")
    with pytest.raises(NotFoundError, match="no such file"):
        read_log(tmp_path / "absent.md", ImportSettings())
    (tmp_path / "bytes.md").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DamagedFileError, match="not UTF-8"):
        read_log(tmp_path / "bytes.md", ImportSettings())


@pytest.mark.parametrize(
    ("cell", "number"),
    [
        ("1.0744", 1.0744),
        ("−0.003", -0.003),
        ("**1.61**", 1.61),
        ("15,909,254", 15909254),
        ("~16", None),
        ("3 %", None),
    ],
)
def test_only_what_is_a_number_is_read_as_one(cell, number):
    assert parse_number(cell) == number


def test_sizes_and_verdicts():
    assert [parse_bytes(cell) for cell in ("15,909,254", "15.96 MB", "~16 MB", "big")] == [
        15909254,
        15960000,
        None,
        None,
    ]
    words = {"New best + faster": "positive", "👑 BEST": "positive", "Worse than E8": "negative", "Goodness": None}
    words |= {"~Same as before": "neutral", "NO-OP": "no-op", "Not run": None, "Slight help": None}
    assert {word: parse_verdict(word) for word in words} == words


# ---- tables as people have them --------------------------------------------------------------------------------------

SHEET = [["name", "val_bpb", "bytes", "notes"], ["base", "1.0870", "15,991,930", "control"]]
SHEET += [["clip 11", "1.0852", "16 104 111", "over"], ["naïve β", "1.0901", "15,900,000", "worse"]]
NUMBERS = [(1.087, 15_991_930), (1.0852, 16_104_111), (1.0901, 15_900_000)]


def sheet(delimiter: str, comma: str = ".") -> str:
    cells = [[cell.replace("1.0", f"1{comma}0") for cell in row] for row in SHEET]
    return "\n".join(delimiter.join(f'"{c}"' if delimiter in c else c for c in row) for row in cells) + "\n"


@pytest.mark.parametrize(
    ("data", "suffix"),
    [
        (sheet(",").encode(), "csv"),
        (sheet(",").encode("utf-8-sig"), "csv"),
        (sheet(",").replace("\n", "\r\n").encode(), "csv"),
        (sheet(",").encode() + b"\0\0\0\n", "csv"),
        (sheet("\t").encode("utf-16"), "csv"),
        (sheet("\t").encode(), "tsv"),
        (sheet(";", ",").encode(), "csv"),
        (("sep=;\n" + sheet(";", ",")).encode(), "csv"),
        (("\ufeffsep=;\r\n" + sheet(";")).encode(), "csv"),
    ],
)
def test_a_sheet_of_any_program_is_the_same_rows(tmp_path, data, suffix):
    (tmp_path / f"log.{suffix}").write_bytes(data)
    rows = read_log(tmp_path / f"log.{suffix}", ImportSettings()).rows
    assert [row.name for row in rows] == ["base", "clip 11", "naïve β"]
    assert [(row.result["bpb"], row.result["artifact_bytes"]) for row in rows] == NUMBERS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (sheet(",") + 'unclosed,"1.1,2,3\nnext,1.2,3,4\n', "never closed"),
        ("\n".join(sheet(",").splitlines()[1:]) + "\n", "its first line names no columns"),
    ],
)
def test_a_sheet_that_would_lose_rows_is_refused(tmp_path, text, message):
    with pytest.raises(DamagedFileError, match=message):
        imported(tmp_path, text, "log.csv")


@pytest.mark.parametrize(
    ("mean", "std"),
    [("Mean", "Std"), ("**Mean**", "**Std**"), ("3-seed mean", "std dev"), ("Average", "σ"), ("mean (3 seeds)", "sd")],
)
def test_rows_that_sum_up_others_are_kept_and_are_no_results(tmp_path, mean, std):
    table = "| Seed | val_bpb | Artifact bytes |\n|---|---|---|\n"
    table += "| 42 | 1.0871 | 15,900,100 |\n| 1337 | 1.0880 | 15,900,200 |\n"
    table += f"| {mean} | 1.0876 | 15,900,150 |\n| {std} | 0.0005 | 50 |\n"
    log = imported(tmp_path, table)
    assert len(log.rows) == log.rows_in == 4
    assert [row.result.get("bpb") for row in log.rows] == [1.0871, 1.088, None, None]
    assert [row.name for row in best_rows(log.rows, None)] == ["42", "1337"]
    assert all("summary" in row.result for row in log.rows[2:])
    assert log.rows[3].settings["val_bpb"] == "0.0005"
    assert any("2 rows sum up others" in line for line in log.declared)


def test_a_summary_is_found_in_whatever_column_names_it_and_nowhere_else(tmp_path):
    table = "| Config | Seed | BPB |\n|---|---|---|\n"
    table += "| wide | 42 | 1.1 |\n| wide | mean | 1.2 |\n| mean pooling | 1 | 1.3 |\n"
    assert [row.result.get("bpb") for row in imported(tmp_path, table).rows] == [1.1, None, 1.3]
    numbered = "| # | Name | Pooling | BPB |\n|---|---|---|---|\n| 1 | a | max | 1.1 |\n| 2 | Mean | - | 1.2 |\n"
    assert [row.result.get("bpb") for row in imported(tmp_path, numbered).rows] == [1.1, None]
    unnamed = imported(tmp_path, "| Name | BPB |\n|---|---|\n| a | 1.1 |\n| ± | 0.0005 |\n| b | 1,087 |\n")
    assert [row.result.get("bpb") for row in unnamed.rows] == [1.1, None, 1.087]
    assert any("1 of 3 cells of 'BPB' stay text" in line for line in unnamed.declared)


@pytest.mark.parametrize(
    "base", ["54ee870", "`54ee870`", "54ee870abcd", "commit 54ee870", "54ee870 (main)", "@54ee870"]
)
def test_a_base_may_name_a_rows_commit(tmp_path, base):
    sha = "54ee870abcd" + "0" * 29
    table = (
        f"| Name | Commit | Base | BPB |\n|---|---|---|---|\n| a | {sha} | | 1.2 |\n| b | 99aabbc | {base} | 1.1 |\n"
    )
    first, second = imported(tmp_path, table).rows
    assert second.parents == (first.id,)
    other = table.replace(f"| {base} |", "| 54ee871 |")
    assert imported(tmp_path, other).rows[1].parents == ("external:54ee871",)


def test_a_base_that_agrees_with_a_short_hash_only_in_its_first_digits_is_another(tmp_path):
    table = "| Name | Commit | Base |\n|---|---|---|\n| a | 54ee870abcd | |\n| b | 99aabbc | 54ee870ffff |\n"
    assert imported(tmp_path, table).rows[1].parents == ("external:54ee870ffff",)


@pytest.mark.parametrize("other", ["ts_utc", "memory_mb", "session_id", "timestamp", "peak_mem_mib", "wall_seconds"])
def test_rows_are_called_by_their_run_id(tmp_path, other):
    text = f"{other},run_id,val_bpb\n2026-04-01T10:00:00Z,lr_sweep_3,1.1\n"
    (row,) = imported(tmp_path, text, "log.csv").rows
    assert (row.name, row.result["bpb"]) == ("lr_sweep_3", 1.1)
    assert row.created.startswith("2026-04-01") is (other in ("ts_utc", "timestamp"))
    (late,) = imported(tmp_path, f"{other},flavour,run_id,val_bpb\n7,plain,lr_sweep_3,1.1\n", "log.csv").rows
    assert late.name == "lr_sweep_3"
    (nameless,) = imported(tmp_path, f"{other},val_bpb,variant\n7,1.1,wide\n", "log.csv").rows
    assert nameless.name == "wide"
    (bare,) = imported(tmp_path, f"{other},val_bpb\n7,1.1\n", "log.csv").rows
    assert bare.name == "row 1"


def test_a_column_of_names_is_not_one_of_bytes(tmp_path):
    table = (
        "| Artifact | BPB | Size |\n|---|---|---|\n| final.int6.ptz | 1.1 | 15.9 MB |\n| final.int8.ptz | 1.2 | - |\n"
    )
    log = imported(tmp_path, table)
    assert [row.name for row in log.rows] == ["final.int6.ptz", "final.int8.ptz"]
    assert [row.result.get("artifact_bytes") for row in log.rows] == [15_900_000, None]
    units = imported(tmp_path, "name,artifact_mb,Total size (MiB)\na,15.9,16\nb,15 MB,\n", "log.csv")
    assert units.rows[0].result == {"artifact_bytes": 15_900_000, "total_bytes": 16 * 2**20}
    assert units.rows[1].result == {"artifact_bytes": 15_000_000}


CELL = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), max_size=6).filter(
    lambda cell: cell == cell.strip()
)
HEADERS = st.lists(
    st.sampled_from(["#", "Experiment", "Base", "Result", "Learning", "BPB", "Size", "Date", "x", "Delta vs 2", ""]),
    max_size=5,
)


@given(header=HEADERS, data=st.data())
def test_every_cell_of_any_sheet_is_kept(tmp_path_factory, header, data):
    """As CSV: whatever the columns are called and the cells hold, rows in = rows out and no text is lost."""
    header = ["Experiment", *header]
    rows = data.draw(st.lists(st.lists(CELL, min_size=len(header), max_size=len(header)), min_size=1, max_size=5))
    out = io.StringIO()
    csv.writer(out).writerows([header, *rows])
    log = imported(tmp_path_factory.mktemp("sheet"), out.getvalue(), "sheet.csv")
    filled = [row for row in rows if any(row)]
    assert len(log.rows) == log.rows_in == len(filled)
    for cells, row in zip(filled, log.rows, strict=True):
        assert {cell for cell in cells if cell} - {"-", "--", "—", "–", "?"} <= cells_kept(row)


@given(st.text("|-:#ab1 \t\n*\\", max_size=80))
def test_any_text_is_searched_and_rows_are_as_wide_as_their_header(text):
    for table in find_tables(text):
        assert {len(row) for row in table.rows} <= {len(table.header)}
        assert len(set(table.header)) == len(table.header)
        assert len(table.sections) == len(table.rows)


# ---- export ----------------------------------------------------------------------------------------------------------


def exported_rows() -> list[Row]:
    plain = Row(
        "trial", "t1", ("p",), "a | b", "sweep", {"clip": 12.85, "roles": ["mlp"]}, result={"bpb": 1.5, "ok": True}
    )
    return [plain, Row("score", "s1", ("t1",), "line\nbreak", verdict="neutral", conclusion='λ, "quoted"')]


def test_json_lines_come_back_as_the_same_rows(tmp_path):
    rows = exported_rows()
    assert imported(tmp_path, to_jsonl(rows), "rows.jsonl").rows == rows
    with pytest.raises(SettingsError, match="do nothing for it"):
        imported(tmp_path, to_jsonl(rows), "rows.jsonl", run="other")
    with pytest.raises(DamagedFileError, match="line 2 is no ledger row"):
        imported(tmp_path, to_jsonl(rows[:1]) + '{"kind": "trial"}\n', "rows.jsonl")


def test_csv_has_a_column_for_every_field_and_markdown_is_one_table():
    first, second = csv.DictReader(io.StringIO(to_csv(exported_rows())))
    assert (first["settings.clip"], first["settings.roles"], first["result.ok"]) == ("12.85", '["mlp"]', "true")
    assert (second["name"], second["conclusion"], second["settings.clip"]) == ("line\nbreak", 'λ, "quoted"', "")
    (table,) = find_tables(to_markdown(exported_rows()))
    assert table.rows[0][table.header.index("name")] == "a | b"
    assert table.rows[1][table.header.index("name")] == "line<br>break"
    assert to_markdown([]) == to_csv([]).strip() == to_jsonl([]) == ""


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "name,val_bpb\n", "under its columns name, val_bpb"),
        ("a.jsonl", "", "nothing to import$"),
    ],
)
def test_a_log_without_rows_is_an_error_that_names_its_columns(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(NotFoundError, match=said):
        require_rows(read_log(tmp_path / name, ImportSettings()), tmp_path / name)
