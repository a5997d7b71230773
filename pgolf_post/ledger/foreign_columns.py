"""The meaning of the columns of a foreign experiment log: recognised by name, printed, and overruled by `--map`.

A field has names that mean it always and names that mean it where nothing better is there. Each field takes one column
and each column at most one field; what is left stays in settings under its own name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

from pgolf_post.errors import SettingsError
from pgolf_post.ledger.schema import Verdict

Field = Literal[
    "number",
    "name",
    "base",
    "motivation",
    "result",
    "learning",
    "bpb",
    "delta_bpb",
    "artifact_bytes",
    "total_bytes",
    "seconds",
    "cost_dollars",
    "device",
    "commit",
    "date",
]
FIELDS: tuple[Field, ...] = get_args(Field)
ALWAYS: dict[Field, tuple[str, ...]] = {
    "number": ("#", "no", "nr", "num", "number", "exp no", "exp number", "experiment number"),
    "name": (
        "experiment",
        "name",
        "exp name",
        "experiment name",
        "run name",
        "run id",
        "run",
        "title",
        "run id / model type",
    ),
    "base": ("base", "based on", "parent", "from", "built on", "source checkpoint", "start from", "base exp"),
    "motivation": ("motivation", "description", "why", "hypothesis", "idea", "rationale", "goal"),
    "result": ("result", "verdict", "outcome", "status"),
    "learning": ("learning", "learnings", "conclusion", "takeaway", "conclusion / takeaway", "lesson", "lessons"),
    "bpb": ("bpb", "val bpb", "final bpb", "quant bpb", "quantized bpb", "bits per byte"),
    "delta_bpb": ("delta bpb", "Δ bpb", "Δbpb", "bpb delta"),
    "artifact_bytes": ("artifact", "artifact bytes", "artifact size", "artifact (bytes)", "compressed size"),
    "total_bytes": ("total bytes", "total size"),
    "seconds": ("seconds", "train seconds", "wall seconds", "time (s)", "seconds total"),
    "cost_dollars": ("cost", "cost ($)", "$", "dollars", "cost (usd)"),
    "device": ("machine", "device", "hardware", "gpu", "gpus"),
    "commit": (
        "commit",
        "git commit",
        "git tag",
        "sha",
        "git sha",
        "git hash",
        "commit hash",
        "commit sha",
        "commit id",
    ),
    "date": ("date", "created", "when", "day", "ts utc", "ts", "timestamp", "timestamp utc", "datetime", "created at"),
}
OTHERWISE: dict[Field, tuple[str, ...]] = {
    "number": ("exp", "id", "trial", "rank"),
    "name": (
        "exp",
        "run",
        "eval type",
        "trial",
        "config",
        "model",
        "task",
        "id",
        "artifact",
        "file",
        "checkpoint",
        "label",
    ),
    "motivation": ("change", "what", "details", "what changed"),
    "learning": ("notes", "note", "observations", "observation", "comment", "comments", "insight"),
    "artifact_bytes": ("size", "bytes"),
}
# Columns that no row is called by: moments, machines' numbers, sessions. Words of a heading.
NO_NAMES = frozenset(
    (
        *("ts", "time", "timestamp", "date", "utc", "epoch", "session", "pid", "uuid", "host"),
        *("memory", "mem", "vram", "ram", "mb", "gb", "mib", "gib", "seconds", "secs", "minutes", "hours", "ms"),
        *("steps", "step", "iteration", "iterations", "tokens", "params", "loss", "lr", "bpb", "bytes", "size", "rate"),
    )
)
DELTA = re.compile(r"^(?:delta|Δ|diff)(?: bpb)?(?: (?:vs\.?|to|against) (?P<base>.+))?$", re.IGNORECASE)
BLANKS = ("", "-", "--", "—", "–", "n/a", "?")

VERDICT_WORDS: dict[Verdict, tuple[str, ...]] = {
    "no-op": ("no-op", "noop", "no op"),
    "positive": ("positive", "winner", "win", "new best", "best", "better", "good", "great", "improved", "big win"),
    "neutral": ("neutral", "tied", "same", "~same", "no change", "no difference", "within noise"),
    "negative": ("negative", "worse", "much worse", "bad", "very bad", "hurts", "harmful", "terrible", "catastrophic"),
}
FAILURE_WORDS = ("crash", "crashed", "broken", "failed", "oom", "error", "diverged")
UNITS = {"": 1, "b": 1, "bytes": 1, "kb": 10**3, "mb": 10**6, "kib": 2**10, "mib": 2**20}


def normal(name: str) -> str:
    """A column's name for comparing: lower case, without markup and outer punctuation."""
    plain = re.sub(r"[*`]", "", name).strip().casefold()
    return plain if plain in ("#", "$") else plain.rstrip(".?:!").strip()


def is_blank(cell: str) -> bool:
    """Whether a cell says nothing: empty, or a dash."""
    return cell.strip().casefold() in BLANKS


def field_of(name: str) -> Field | None:
    """The field that a column's name always means."""
    return next((field for field, names in ALWAYS.items() if heading(name) in map(heading, names)), None)


def heading(name: str) -> str:
    """A column's heading for comparing: as `normal`, with `_` and `-` as spaces."""
    return re.sub(r"[\s_-]+", " ", normal(name)).strip()


def unit_of(name: str) -> str:
    """The unit of bytes that a heading ends with: `artifact_mb`, `Size (MiB)`; empty where it has none."""
    matched = re.search(r"[ (]([a-z]+)\)?$", heading(name))
    return matched[1] if matched and matched[1] in UNITS else ""


def _bare_heading(name: str) -> str:
    """A heading without its unit of bytes."""
    unit = unit_of(name)
    return re.sub(rf"[ (]+{unit}\)?$", "", heading(name)).strip() if unit and unit != "bytes" else heading(name)


def recognise(
    header: Sequence[str], mapping: Mapping[str, str], rows: Sequence[Sequence[str]] = ()
) -> dict[Field, str]:
    """Field → column. `mapping` (field → column name, or empty for none) comes first, and only where the column is.

    A column is numbers or bytes only if a cell of it can be read as that, or none says anything.
    """
    columns = {_bare_heading(name): name for name in reversed(header)} | {heading(x): x for x in reversed(header)}
    mapped = {normal(name): name for name in reversed(header)}
    taken: dict[Field, str] = {}
    for field in FIELDS:
        if field in mapping and normal(mapping[field]) in mapped:
            taken[field] = mapped[normal(mapping[field])]
    closed = set(mapping)
    for names in (ALWAYS, OTHERWISE):
        for field in FIELDS:
            if field in taken or field in closed:
                continue
            free = [columns[name] for name in map(heading, names.get(field, ())) if name in columns]
            free = [column for column in free if column not in taken.values() and _fits(field, column, header, rows)]
            if free:
                taken[field] = free[0]
    if "bpb" in taken and "delta_bpb" not in taken and "delta_bpb" not in closed:
        deltas = [name for name in header if DELTA.match(normal(name)) and name not in taken.values()]
        taken |= {"delta_bpb": deltas[0]} if deltas else {}
    if "name" not in taken and "name" not in closed and header:
        free = [name for name in header if name not in taken.values()]
        named = [name for name in free if not NO_NAMES & set(re.findall(r"[a-z]+", heading(name)))]
        taken |= {"name": named[0]} if named else {}
    return taken


def _fits(field: Field, column: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    """Whether cells of a column can be read as a field's numbers."""
    if field not in READERS and field not in READ_AS_BYTES:
        return True
    cells = [row[list(header).index(column)] for row in rows]
    filled = [cell for cell in cells if not is_blank(cell)]
    return not filled or any(read_cell(field, cell, column) is not None for cell in filled)


def delta_base(column: str) -> str | None:
    """The base that a column of differences names: `Delta vs B4` → `b4`."""
    matched = DELTA.match(normal(column))
    return matched["base"] if matched else None


def parse_mapping(text: str) -> dict[str, str]:
    """`number=Exp,base=Base` as field → column. Raises SettingsError naming the fields there are."""
    mapping = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        field, equals, column = part.partition("=")
        if not equals or field.strip() not in FIELDS:
            raise SettingsError(f"--map {part!r}: expected FIELD=COLUMN with a field of {', '.join(FIELDS)}")
        mapping[field.strip()] = column.strip()
    return mapping


def parse_number(cell: str) -> float | None:
    """A cell that is a number and nothing else, markup aside: `1.07`, `−0.003`, `**1.61**`; None for `~16`, `3 %`.

    Thousands may be set off by commas or spaces: `15,991,930`, `15 991 930`.
    """
    plain = re.sub(r"[*`_]", "", cell).strip().replace("−", "-").replace("–", "-")
    plain = re.sub(r"(?<=\d)[, \u00a0\u202f](?=\d{3}\b)", "", plain)
    return float(plain) if re.fullmatch(r"[+-]?\d+(?:\.\d*)?(?:[eE][+-]?\d+)?", plain) else None


def parse_bpb(cell: str) -> float | None:
    """A cell of bits per byte or of their difference, where a comma can only be a decimal one: `1,087`."""
    plain = re.sub(r"[*`_]", "", cell).strip()
    return parse_number(re.sub(r"^([+−–-]?\d),(\d+)$", r"\1.\2", plain))


def parse_bytes(cell: str, unit: str = "") -> int | None:
    """`15,909,254` or `15.96 MB` (decimal, as the challenge counts) as bytes; None for anything else, as `~16 MB`.

    `unit` is that of the column's heading, for cells that have none of their own.
    """
    plain = re.sub(r"[*`_]", "", cell).strip().casefold()
    matched = re.fullmatch(r"(?P<number>\d[\d.,\s]*)(?P<unit>[a-z]*)", plain)
    if not matched or matched["unit"] not in UNITS:
        return None
    number = parse_number(matched["number"])
    return None if number is None else round(number * UNITS[matched["unit"] or unit])


READERS: dict[Field, Callable[[str], float | None]] = {
    "bpb": parse_bpb,
    "delta_bpb": parse_bpb,
    "seconds": parse_number,
    "cost_dollars": parse_number,
}  # of fields that are numbers; bytes are read with their column's unit
READ_AS_BYTES: tuple[Field, ...] = ("artifact_bytes", "total_bytes")
BPB_RANGE = (0.05, 50.0)  # what bits per byte of a text can be


def read_cell(field: Field, cell: str, column: str) -> float | None:
    """A cell as a field's number; None where it is not one, or none that the field can have."""
    reader = READERS.get(field)
    if reader is None:
        return parse_bytes(cell, unit_of(column))
    value = reader(cell)
    return None if field == "bpb" and value is not None and not BPB_RANGE[0] <= value <= BPB_RANGE[1] else value


SUMMARIES = re.compile(
    r"(?:\d+[ -]?seeds? )?(mean|average|avg|std|stdev|std dev|stddev|standard deviation|sd|sem|stderr|σ|median|min|max"
    r"|range|spread|total|sum|mean ?(?:±|/|and) ?(?:std|sd))(?: (?:of|over) .*| ?\(.*\)| ?[±/] ?\S+)?"
)


def summary_of(named: Mapping[str, str], name: str) -> str | None:
    """Return how a row sums up those above it: `mean`, `std` …; None for a row of its own.

    It says so where rows are called something: in its first cell that says anything, its name, or a column of seeds.
    """
    first = next((cell for cell in named.values() if not is_blank(cell)), "")
    labels = [first, name, *(cell for column, cell in named.items() if heading(column) in ("seed", "seeds", "run"))]
    matched = next((found for label in labels if (found := SUMMARIES.fullmatch(heading(label)))), None)
    return matched[1] if matched else None


def parse_verdict(cell: str) -> Verdict | None:
    """The verdict that a cell begins with, as a word of its own; None where it begins otherwise."""
    plain = normal(re.sub(r"^[^\w~]+", "", cell))
    for verdict, words in VERDICT_WORDS.items():
        if any(re.match(rf"{re.escape(word)}(?![\w-])", plain) for word in words):
            return verdict
    return None


MARKS: dict[str, Verdict] = {
    **dict.fromkeys("✅✓🟢⭐", "positive"),
    **dict.fromkeys("❌✗🔴", "negative"),
    **dict.fromkeys("⚪🟡≈⚠", "neutral"),
}
NOT_RUN = re.compile(r"not (?:yet )?(?:run|trained|tracked)|never ran|no results|pending", re.IGNORECASE)


def parse_mark(text: str) -> Verdict | None:
    """The verdict of the first mark (✅ 🟢 ⭐, ❌ 🔴, ⚪ 🟡) in a text; None without one, or of what was not run."""
    if NOT_RUN.search(text):
        return None
    return next((MARKS[letter] for letter in text if letter in MARKS), None)


def is_failure(cell: str) -> bool:
    """Whether a cell says that it did not work: begins with crash, broken, failed …"""
    plain = normal(re.sub(r"^\W+", "", cell))
    return any(re.match(rf"{word}\b", plain) for word in FAILURE_WORDS)
