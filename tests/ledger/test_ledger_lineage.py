"""Trees: every row once, deltas only between numbers of one kind, circles and strangers survived."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pgolf_post.ledger import Row
from pgolf_post.ledger.lineage import describe, draw, tree_of, trees


def trial(id: str, *parents: str, bpb: float | None = None, **result: object) -> Row:
    numbers = {"bpb": bpb} if bpb is not None else {}
    return Row("trial", id, parents, id, result={**numbers, **result}, created=f"2026-01-01T00:00:{len(id):02d}")


def by_id(roots):
    return {node.id: node for root in roots for _, node in root.walk()}


def test_a_node_shows_its_difference_to_the_nearest_ancestor_that_has_one():
    rows = [trial("a", bpb=1.10, artifact_bytes=1000), trial("b", "a"), trial("c", "b", bpb=1.07, artifact_bytes=1200)]
    (root,) = trees(rows)
    node = by_id([root])["c"]
    assert round(node.delta_bpb, 9) == -0.03
    assert node.delta_bytes == 200
    assert describe(node) == "trial c  bpb 1.07000 (-0.03000) · 1,200 B (+200)"


def test_scores_of_other_text_or_protocol_are_not_compared():
    checkpoint = Row(
        "checkpoint", "ck", name="ck", result={"bpb": 1.5, "tokens": 100, "bytes": 250, "protocol": "plain"}
    )
    whole = Row("score", "s1", ("ck",), settings={"protocol": "plain"}, result={"bpb": 1.2, "tokens": 900, "bytes": 1})
    slid = Row("score", "s2", ("ck",), settings={"protocol": "sliding"}, result={"bpb": 1.1, "tokens": 900, "bytes": 1})
    artifact = Row("artifact", "art", ("ck",), result={"artifact_bytes": 5})
    packed = Row(
        "score", "s3", ("art",), settings={"protocol": "plain"}, result={"bpb": 1.3, "tokens": 900, "bytes": 1}
    )
    nodes = by_id(trees([checkpoint, whole, slid, artifact, packed]))
    assert nodes["s1"].delta_bpb is None
    assert nodes["s2"].delta_bpb is None
    assert round(nodes["s3"].delta_bpb, 9) == 0.1  # against the same protocol's score of the checkpoint
    assert nodes["s3"].delta_bytes is None  # an artifact's score has that artifact's bytes


def measured(id: str, *parents: str, bpb: float, kind: str = "trial", settings=None, **result: object) -> Row:
    return Row(kind, id, parents, id, settings=settings or {}, result={"bpb": bpb, **result})


def test_what_is_not_known_to_be_the_same_text_is_not_subtracted_and_the_tree_says_so():
    text = {"tokens": 900, "bytes": 2200, "protocol": "plain"}
    rows = [
        measured("a", bpb=1.2, **text),
        measured("same", "a", bpb=1.1, **text),
        measured("other text", "a", bpb=1.1, **{**text, "tokens": 901}),
        measured("other bytes", "a", bpb=1.1, **{**text, "bytes": 2201}),
        measured("other protocol", "a", bpb=1.1, **{**text, "protocol": "sliding"}),
        measured("silent", "a", bpb=1.1),
        measured("further", "silent", bpb=1.0, **text),
    ]
    nodes = by_id(trees(rows))
    assert {id: node.delta_bpb is None for id, node in nodes.items()} == {
        "a": True,
        "same": False,
        "other text": True,
        "other bytes": True,
        "other protocol": True,
        "silent": True,
        "further": False,
    }
    assert round(nodes["further"].delta_bpb, 9) == -0.2  # past the silent one
    assert describe(nodes["other text"]) == "trial other text  bpb 1.10000 (not compared: another text than a)"
    assert nodes["other protocol"].facts()["not_compared"] == "another protocol than a"
    assert nodes["silent"].not_compared == "perhaps another text (one does not say) than a"
    assert nodes["a"].not_compared == ""
    assert "not_compared" not in nodes["same"].facts()


def test_rows_of_logs_compare_within_a_log_where_they_say_nothing_else():
    told = {"table": "t"}
    base = Row("trial", "base", (), "base", "log", told, result={"bpb": 1.2})
    same = Row("trial", "same", ("base",), "same", "log", told, result={"bpb": 1.1})
    elsewhere = Row("trial", "elsewhere", ("base",), "elsewhere", "other log", told, result={"bpb": 1.1})
    assert round(by_id(trees([base, same]))["same"].delta_bpb, 9) == -0.1
    assert by_id(trees([base, elsewhere]))["elsewhere"].delta_bpb is None
    long, short = ({**told, "Val tokens": count} for count in ("62M", "1M"))
    first = Row("trial", "first", (), "first", "log", long, result={"bpb": 1.2})
    second = Row("trial", "second", ("first",), "second", "log", short, result={"bpb": 1.1})
    assert by_id(trees([first, second]))["second"].not_compared == "another text than first"


def test_trials_compare_by_the_stage_that_decides():
    def staged(id: str, *parents: str, protocol: str = "p1", stage: str = "plain", tokens: int = 900) -> Row:
        part = {"bpb": 1.2 if not parents else 1.1, "tokens": tokens, "bytes": 2 * tokens}
        return Row(
            "trial", id, parents, id, "s", result={"bpb": part["bpb"], stage: part, "protocols": {stage: protocol}}
        )

    rows = [
        staged("a"),
        staged("b", "a"),
        staged("c", "a", protocol="p2"),
        staged("d", "a", tokens=3),
        staged("e", "a", stage="sliding"),
    ]
    nodes = by_id(trees(rows))
    assert [nodes[id].not_compared for id in "bcde"] == [
        "",
        "another protocol than a",
        "another text than a",
        "another protocol than a",
    ]


def test_a_comparison_shows_what_it_found():
    found = {"bpb": 1.1, "difference_bpb": -0.002, "low_bpb": -0.003, "high_bpb": -0.001}
    scores = [Row("score", id, result={"bpb": 1.1}) for id in ("s1", "s2")]
    first, _ = trees([*scores, Row("comparison", "c", ("s1", "s2"), "A against B", result=found)])
    (node,) = first.children
    assert node.delta_bpb == -0.002
    assert describe(node) == "comparison A against B  difference -0.00200 [-0.00300 … -0.00100] · also from s2"


def test_a_parent_outside_the_ledger_is_a_node_that_says_so():
    (root,) = trees([trial("x", "external:PR #1855", bpb=1.2), trial("y", "external:PR #1855")])
    assert describe(root) == "PR #1855  (not in the ledger)"
    assert [child.id for child in root.children] == ["x", "y"]


def test_a_full_parent_id_finds_the_row_that_has_its_first_digits():
    full = "0123456789abcdef" * 4
    (root,) = trees([Row("stats", full[:12], name="stats"), Row("artifact", "art", (full,), "art")])
    assert [child.id for child in root.children] == ["art"]


def test_one_row_is_shown_with_its_ancestors_and_descendants_alone():
    rows = [trial("a"), trial("b", "a"), trial("sibling", "a"), trial("c", "b"), trial("d", "c"), trial("e", "c")]
    root = tree_of(rows, rows[3])
    assert [node.id for _, node in root.walk()] == ["a", "b", "c", "d", "e"]


def test_no_line_of_the_drawing_is_cut():
    rows = [trial("n0")] + [trial(f"n{i}" + "x" * 90, f"n{i - 1}" + "x" * 90 * (i > 1), bpb=1.5) for i in range(1, 9)]
    lines = draw(trees(rows)[0]).splitlines()
    assert len(lines) == 9
    assert all("bpb 1.50000" in line and "x" * 90 in line for line in lines[1:])


IDS = [f"r{number}" for number in range(8)]


@given(st.lists(st.sampled_from([*IDS, "external:e", "nowhere"]), max_size=2).flatmap(
    lambda _: st.lists(st.lists(st.sampled_from([*IDS, "external:e", "nowhere"]), max_size=2), min_size=8, max_size=8)
))  # fmt: skip
def test_every_row_is_in_exactly_one_tree_whatever_names_whom(parents):
    """Circles, rows that name themselves, and strangers included."""
    rows = [trial(id, *named) for id, named in zip(IDS, parents, strict=True)]
    found = [node.id for root in trees(rows) for _, node in root.walk() if node.row is not None]
    assert sorted(found) == IDS
