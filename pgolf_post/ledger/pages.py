"""Records of experiments on a page of notes, outside of its tables: cards, leaderboards without borders, drawn trees.

    exp07 — Wider MLP (from exp05)        a card: a heading, the line "Field Value", a line for each field, and
    Field Value                           paragraphs that begin with Details:, Observations:, Verdict: …
    Quant BPB 1.2690

    Rank Exp Name Quant BPB Size          a leaderboard that was copied from a rendered page: its header is cut into
    1 07 wider-mlp 1.2690 15.54 MB        known headings, its lines by the shapes of their cells

    exp05 (baseline)                      a tree: who hangs below whom is the base
     └── exp07 [✅ POSITIVE] wider (quant 1.2690)

Each becomes a record under the experiment's name; `merged` in importing.py joins records of one name into one row. A
line of a leaderboard with fewer numbers than columns does not say which is missing: its numbers stay text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pgolf_post.ledger.foreign_columns import normal, parse_bytes, parse_mark, parse_verdict, summary_of
from pgolf_post.ledger.schema import Verdict

Source = Literal["card", "leaderboard", "tree"]
Protocol = Literal["ttt", "sliding", "quantized", "val", "unquantized"]
PROTOCOLS: tuple[Protocol, ...] = ("ttt", "sliding", "quantized", "val", "unquantized")  # the last stage first

BPB_HEADINGS: dict[str, Protocol] = {
    "quant bpb": "quantized", "post-quant bpb": "quantized", "quant val_bpb": "quantized", "int6_bpb": "quantized",
    "quantized": "quantized", "raw bpb": "unquantized", "pre-quant bpb": "unquantized",
    "pre-quant val_bpb": "unquantized", "post-ema (pre-quant)": "unquantized", "post_ema_val_bpb": "unquantized",
    "sliding bpb": "sliding", "legal_ttt": "ttt", "post-ttt": "ttt", "best legal_ttt": "ttt",
    "val_bpb": "val", "final bpb": "val", "bpb": "val",
}  # fmt: skip
SIZE_HEADINGS = ("artifact (bytes)", "artifact_bytes", "artifact", "size")
NUMBER = r"\d\.\d{2,}"
SHAPES = {  # of a leaderboard's other columns; what is not here is free text
    "rank": r"\d+", "base": r"(?:exp)?\d+[a-z]?(?=\s|$)", "steps": r"~?\d[\d,]{2,6}", "ms/step": r"~?\d[\d.]{1,6}",
    "step_avg": r"\d+ms", "under 16mb?": r"(?:Yes|No)\b", "date": r"\d{4}-\d{2}(?:-\d{2})?",
    "hardware": r"\d+×\w+(?: \(\w+\))?",
}  # fmt: skip
BPB_SHAPE = rf"~?{NUMBER}\*?(?: \([^)]*\))?|(?:N/A|—)(?: \([^)]*\))?"
SIZE_SHAPE = r"(?:~?\d[\d.,]* ?(?:[KM]i?B|bytes)\b|\d{1,3}(?:,\d{3})+|\d{5,})(?: \([^)]*\))?"
NAMES = ("exp", "experiment", "seed")  # headings of what a line is called by
TITLES = ("name", "description")  # free text that more columns follow
FREE = (*TITLES, "verdict", "status", "tag", "key change", "source", "changes", "config")
HEADINGS = (*BPB_HEADINGS, *SIZE_HEADINGS, *SHAPES, *NAMES, *FREE)
CARD_HEADERS = ("field value", "metric value")
CARD_BPB: dict[str, Protocol] = {**BPB_HEADINGS, "legal_ttt val_bpb": "ttt"}
CARD_KEYS = (
    *(*CARD_BPB, *SIZE_HEADINGS, "based on", "status", "steps", "folder", "extra params", "ms/step", "changes"),
    *("key difference", "mse improvement", "hardware", "3-seed mean", "wallclock", "base", "seeds"),
)
PARAGRAPH = re.compile(r"^(?P<key>Details|Change|Changes|Observations?|Finding|Conclusion|Verdict): (?P<text>.+)$")
LEARNINGS = ("observation", "observations", "finding", "conclusion")
BRANCH = re.compile(r"^(?P<before>[\s│|]*)[├└]──+\s*(?P<text>.+)$")
IN_TREE: tuple[tuple[str, Protocol], ...] = (
    (rf"({NUMBER}) legal_ttt", "ttt"),
    (rf"sliding(?: bpb)? ({NUMBER})", "sliding"),
    (rf"(?<!-)\bquant(?: bpb)? ({NUMBER})", "quantized"),
    (rf"[Pp]re-quant ({NUMBER})|({NUMBER}) pre-quant", "unquantized"),
)


@dataclass
class Record:
    """One card, line or branch: what it says of an experiment."""

    name: str
    source: Source
    text: str  # as it stands there
    base: str = ""
    bpb: dict[Protocol, float] = field(default_factory=dict)
    artifact_bytes: int | None = None
    verdict: Verdict | None = None
    motivation: str = ""
    learning: str = ""
    fields: dict[str, str] = field(default_factory=dict)
    unclear: bool = False  # fewer numbers than columns
    summary: str | None = None  # how a line sums up others: its numbers are no results

    @property
    def says(self) -> bool:
        """Whether it says more than a name."""
        return bool(self.base or self.bpb or self.artifact_bytes or self.verdict or self.motivation or self.fields)


def read_records(text: str) -> list[Record]:
    """Return a page's records: cards, then leaderboards, then trees, each as they stand in it."""
    lines = text.split("\n")
    return [*_cards(lines), *_leaderboards(lines), *_trees(lines)]


def key_of(name: str) -> str:
    """`54b`, `exp54b` and `Exp54b` as one key, and other names as they are, without case and marks."""
    word = normal(re.split(r"[\s(]", name.strip(), maxsplit=1)[0])
    matched = re.fullmatch(r"(?:exp)?[-_ ]?(\d+[a-z]*)", word)
    return f"exp{matched[1]}" if matched else word


# ---- cards -----------------------------------------------------------------------------------------------------------


def _cards(lines: Sequence[str]) -> Iterator[Record]:
    starts = [at for at, line in enumerate(lines) if normal(line.replace("\t", " ")) in CARD_HEADERS]
    for start, after in zip(starts, [*starts[1:], len(lines)], strict=False):
        heading = _heading_above(lines, start)
        if heading is None:
            continue
        end = next((at for at in range(start + 1, len(lines)) if not lines[at].strip()), len(lines))
        pairs = dict(_pair(line) for line in lines[start + 1 : end])
        stop = next((at for at in range(end, after) if _is_heading(lines[at])), after)
        paragraphs = {m["key"].casefold(): m["text"] for at in range(end, stop) if (m := PARAGRAPH.match(lines[at]))}
        yield _card(heading, pairs, paragraphs)


def _card(heading: str, pairs: dict[str, str], paragraphs: dict[str, str]) -> Record:
    title = re.sub(r"^\d+(?:\.\d+)*\.? ", "", heading).strip()
    record = Record(re.split(r" — | \(", title, maxsplit=1)[0].strip(), "card", title)
    for key, value in pairs.items():
        if key in CARD_BPB and (number := re.fullmatch(rf"({NUMBER})(?: \([^)]*\))?", value)):
            record.bpb.setdefault(CARD_BPB[key], float(number[1]))
        elif key in SIZE_HEADINGS:
            record.artifact_bytes = parse_bytes(value.partition(" (")[0])
    named = re.search(r"\(from ([^)]+)\)", heading)
    record.base = pairs.get("based on", pairs.get("base", named[1] if named else ""))
    status = paragraphs.get("verdict", pairs.get("status", ""))
    record.verdict = parse_mark(status) or parse_verdict(status) or parse_mark(heading)
    record.motivation = next((paragraphs[key] for key in ("details", "change") if key in paragraphs), "")
    record.motivation = record.motivation or pairs.get("changes", "")
    record.learning = " ".join(paragraphs[key] for key in LEARNINGS if key in paragraphs)
    record.fields = {**pairs, **({"verdict": paragraphs["verdict"]} if "verdict" in paragraphs else {})}
    return record


def _heading_above(lines: Sequence[str], at: int) -> str | None:
    """Return the nearest heading above a line: the one just above it, or a numbered one before other text."""
    above = [line.strip() for line in lines[max(0, at - 8) : at] if line.strip()]
    return next((line for line in reversed(above) if _is_heading(line)), above[-1] if above else None)


def _is_heading(line: str) -> bool:
    numbered = re.match(r"^\d+(?:\.\d+)*\.? \S", line) and not line.startswith(" ")
    return len(line) < 160 and bool(numbered or (re.match(r"^\S.{0,60} — ", line) and not PARAGRAPH.match(line)))


def _pair(line: str) -> tuple[str, str]:
    """Cut a card's line into key and value: at a tab, after a known key, else after its first word."""
    plain = line.strip()
    if "\t" in plain:
        key, _, value = plain.partition("\t")
        return normal(key), value.strip()
    words = plain.split(" ")
    known = next((n for n in range(min(4, len(words)), 0, -1) if normal(" ".join(words[:n])) in CARD_KEYS), 1)
    return normal(" ".join(words[:known])), " ".join(words[known:])


# ---- leaderboards ----------------------------------------------------------------------------------------------------


def _leaderboards(lines: Sequence[str]) -> Iterator[Record]:
    for at, line in enumerate(lines):
        columns = cut_header(line)
        if columns is None:
            continue
        for row in lines[at + 1 :]:
            if not row.strip() or "\t" in row:
                break
            yield _line(columns, row.strip())


def cut_header(line: str) -> list[str] | None:
    """Return a header's headings; None for a line that is not made of known ones, with a name and bpb or marks."""
    words, columns = normal(line).split(), list[str]()
    while words:
        size = next((n for n in range(min(4, len(words)), 0, -1) if " ".join(words[:n]) in HEADINGS), 0)
        if not size:
            return None
        columns.append(" ".join(words[:size]))
        words = words[size:]
    is_named = any(name in columns[:2] for name in NAMES)
    says = any(column in BPB_HEADINGS or column == "tag" for column in columns)
    return columns if is_named and says and len(columns) >= 3 and len(set(columns)) == len(columns) else None


def _line(columns: Sequence[str], line: str) -> Record:
    cells = cut_line(columns, line)
    name = next(cells[key] for key in NAMES if key in cells)
    record = Record(f"seed_{name}" if "seed" in cells else name, "leaderboard", line, fields=cells)
    asked = [column for column in columns if column in BPB_HEADINGS]
    given = [column for column in asked if column in cells]
    record.unclear = 0 < len(given) < len(asked)
    record.summary = summary_of({}, name)
    for column in given if not (record.unclear or record.summary) else ():
        if re.fullmatch(NUMBER, cells[column]):
            record.bpb.setdefault(BPB_HEADINGS[column], float(cells[column]))
    size = next((cells[column] for column in SIZE_HEADINGS if column in cells), "")
    record.artifact_bytes = parse_bytes(size) if size else None
    record.base = cells.get("base", "")
    said = next((cells[column] for column in ("verdict", "status", "tag") if column in cells), "")
    record.verdict = parse_mark(said) or parse_verdict(said)
    record.motivation = cells.get("description", cells.get("name", cells.get("key change", "")))
    return record


def cut_line(columns: Sequence[str], line: str) -> dict[str, str]:
    """Cut a line into cells: of all ways, the one in which most cells have their column's shape; free text between."""
    found: dict[str, str] = {}
    at, place = 0, 0
    while place < len(columns) and columns[place] not in FREE:
        matched = re.compile(f"(?:{_shape(columns[place])})(?=\\s|$)").match(line, at)
        if matched:
            found[columns[place]] = matched[0]
            at = matched.end() + len(line[matched.end() :]) - len(line[matched.end() :].lstrip())
        place += 1
    if place == len(columns) or columns[place] not in TITLES:
        return found | _tail(columns[place:], line, at)[0]
    ends = [match.start() for match in re.finditer(r"\s|$", line) if match.start() > at]
    tries = [(end, *_tail(columns[place + 1 :], line, end)) for end in ends]
    end, after, count = max(tries, key=lambda one: (one[2], -one[0]), default=(len(line), {}, 0))
    title = line[at : end if count else len(line)].strip()
    return {**found, **({columns[place]: title} if title else {}), **(after if count else {})}


def _tail(columns: Sequence[str], line: str, at: int) -> tuple[dict[str, str], int]:
    """Return the cells after a free text that ends here, and how many of them have a shape of their own."""
    found, count = dict[str, str](), 0
    for column in columns:
        rest = line[at:].lstrip()
        start = len(line) - len(rest)
        if column in FREE:
            if rest:
                found[column] = rest
                count += 1 if parse_mark(rest[:2]) else 0
            return found, count
        matched = re.match(f"(?:{_shape(column)})(?=\\s|$)", rest)
        if matched:
            found[column], at, count = matched[0], start + matched.end(), count + 1
    return found, count if not line[at:].strip() else 0


def _shape(column: str) -> str:
    if column in BPB_HEADINGS:
        return BPB_SHAPE
    return SIZE_SHAPE if column in SIZE_HEADINGS else SHAPES.get(column, r"\S+")


# ---- trees -----------------------------------------------------------------------------------------------------------


def _trees(lines: Sequence[str]) -> Iterator[Record]:
    path: list[tuple[int, str]] = []  # column of the branch, name
    for at, line in enumerate(lines):
        matched = BRANCH.match(line)
        if matched is None:
            if not re.match(r"^[\s│|→]*(?:→.*)?$", line) or not line.strip():
                path = []
            continue
        column = len(matched["before"])
        if not path:
            root = next((one.strip() for one in reversed(lines[:at]) if one.strip(" │|")), "")
            path = [(-1, _name_in(root))]
            yield _branch(root, "")
        path = [step for step in path if step[0] < column]
        yield _branch(matched["text"], path[-1][1] if path else "")
        path.append((column, _name_in(matched["text"])))


def _name_in(text: str) -> str:
    return re.split(r"[\s(\[]", text.strip(), maxsplit=1)[0]


def _branch(text: str, base: str) -> Record:
    plain = re.sub(r"\*\*|─{2,}", " ", text)
    record = Record(_name_in(plain), "tree", " ".join(plain.split()), base)
    for pattern, protocol in IN_TREE:
        if matched := re.search(pattern, plain):
            record.bpb.setdefault(protocol, float(next(group for group in matched.groups() if group)))
    record.verdict = parse_mark(plain)
    return record


def facts_of(records: Sequence[Record]) -> dict[str, Any]:
    """Return what records say together: of each fact the first that is told; of numbers, what disagrees beside."""
    bpb: dict[str, float] = {}
    disagree = []
    for record in records:
        for protocol, value in record.bpb.items():
            if round(bpb.setdefault(protocol, value), len(f"{value}".partition(".")[2])) != value:
                disagree.append(f"{protocol} {bpb[protocol]:g}, {value:g} in a {record.source}")
    texts = {
        key: next((getattr(one, key) for one in records if getattr(one, key)), None)
        for key in ("base", "artifact_bytes", "verdict", "motivation", "learning")
    }
    return {**texts, "bpb": bpb, "disagree": list(dict.fromkeys(disagree))}
