"""What is constant in a whole program is folded, what nobody reads goes, and nothing else changes."""

from __future__ import annotations

import ast
import warnings
from pathlib import Path
from typing import Any

import pytest

from pgolf_post.submit.amalgamate import Amalgam
from pgolf_post.submit.facts import Facts, Partly
from pgolf_post.submit.foreign import foreign_names
from tests.submit.project import Known, Project, run

RECORDS = "import numpy as np\nfrom dataclasses import dataclass, replace\nfrom typing import NamedTuple\n"
PATH = (
    RECORDS + "@dataclass(frozen=True)\nclass Path:\n    values: np.ndarray\n    lattice: int | None = None\n"
    "@dataclass(frozen=True)\nclass Copy:\n    values: np.ndarray\n    lattice: int | None\n"
    "def copied(path, lattice): return Copy(path.values, lattice)\n"
    "def size(copy):\n    if copy.lattice is not None:\n        return crystal(copy)\n    return len(copy.values)\n"
    "def crystal(copy): return -1\n"
)


OWN = RECORDS + "@dataclass(frozen=True)\nclass Own:\n    values: np.ndarray\n    ndim: int\n"
CHANGING: dict[str, tuple[str, Any]] = {  # name → (module, what main returns)
    "a parameter that is set in a branch": (
        "def f(x):\n    if x is None:\n        x = 3\n    return x\ndef main(): return f(1), f(None)\n",
        (1, 3),
    ),
    "a parameter that is set after it was read": (
        "def f(x):\n    was = x is None\n    x = None\n    return was, x\ndef main(): return f(1), f(None)\n",
        ((False, None), (True, None)),
    ),
    "a parameter that is None later and never again something else": (
        (
            "def f(x):\n    had = x is not None\n    x = None\n    for _ in range(2):\n        if x is not None:\n"
            "            x = undefined_here\n    return had\ndef main(): return f(1), f(None)\n"
        ),
        (True, False),
    ),
    "a field that is replaced and that a library's objects have too": (
        OWN + "def dims(own: Own): return own.ndim + 0 * len(own.values)\n"
        "def main():\n    own = Own(np.zeros(2), 7)\n    return dims(own), dims(replace(own, ndim=8))\n",
        (7, 8),
    ),
    "a field that one call takes from a library's object": (
        OWN + "def dims(own: Own): return own.ndim + 0 * len(own.values)\n"
        "def main():\n    values = np.zeros(2)\n    return dims(Own(values, 3)), dims(Own(values, values.ndim))\n",
        (3, 1),
    ),
    "a field that one call takes from another record": (
        RECORDS + "@dataclass(frozen=True)\nclass Own:\n    values: np.ndarray\n    deep: int\n"
        "class Other(NamedTuple):\n    deep: int\n"
        "def size(own: Own): return own.deep + 0 * len(own.values)\n"
        "def main():\n    values = np.zeros(2)\n    return size(Own(values, 3)), size(Own(values, Other(5).deep))\n",
        (3, 5),
    ),
    "a field that comes after those of the class that it was made from": (
        RECORDS + "@dataclass\nclass Base:\n    wide: int\n@dataclass\nclass Own(Base):\n    unread: int\n"
        "    values: np.ndarray\ndef size(own): return own.wide, len(own.values)\n"
        "def main():\n    n = len('ab')\n    return size(Own(n, n + 1, np.zeros(n)))\n",
        (2, 2),
    ),
    "a parameter behind a positional one": (
        "def second(first, /, x): return x\ndef main():\n    n = len('ab')\n    return second(n, n + 1)\n",
        3,
    ),
    "a method whose name an attribute has": (
        (
            "class Own:\n    def size(self): return 1\nclass Held:\n    def __init__(self, size): self.size = size\n"
            "def two(): return 2\ndef main(): return [each.size() for each in (Own(), Held(two))]\n"
        ),
        [1, 2],
    ),
    "the last item of a loop that does nothing": (
        "def main():\n    for i in range(3):\n        pass\n    return i\n",
        2,
    ),
}


GOING: dict[str, tuple[str, Any, tuple[str, ...]]] = {  # name → (module, what main returns, words that go)
    "a field that nobody reads goes, and one of a tuple stays": (
        RECORDS + "@dataclass\nclass Held:\n    values: np.ndarray\n    unread: str\n"
        "class Pair(NamedTuple):\n    left: int\n    right: np.ndarray\n"
        "@dataclass(frozen=True)\nclass Key:\n    name: str\n    place: int\n"
        "def total(left, right): return left + int(right.sum())\n"
        "def main():\n    held = Held(np.arange(3), 'why')\n"
        "    return total(*Pair(1, held.values)), len({Key('a', 1), Key('a', 2)})\n",
        (4, 2),
        ("unread",),
    ),
    "a field that no record sets is folded through all that copy it": (
        PATH + "def main():\n    path = Path(np.arange(3))\n    return size(copied(path, path.lattice))\n",
        3,
        ("lattice", "crystal"),
    ),
    "a local that would only be set where it is set already is none": (
        (
            "def split(pair): return undefined_here\n"
            "def main():\n    lanes = None\n    other = None\n    for i in range(3):\n"
            "        if lanes is not None:\n            lanes = split(lanes)\n"
            "        other = i if other is None else other + i\n    return lanes is None, other\n"
        ),
        (True, 3),
        ("split",),
    ),
    "attributes of a class that nothing reads go": (
        (
            "class Layer:\n    fused = None\n    width = 2\n"
            "    def run(self, x):\n        return self.fused(x) if self.fused is not None else x * self.width\n"
            "def main():\n    return Layer().run(3)\n"
        ),
        6,
        ("fused",),
    ),
    "a list of one value is that value wherever it is read": (
        (
            "class Known: pass\n"
            "class Model:\n    def controls(self, place): return None\n"
            "    def width(self, layer, seen):\n        unread: int = layer\n"
            "        return [3, 3][layer] if self.controls(layer) is None else seen.pop()\n"
            "def main():\n    return [Model().width(layer, []) for layer in range(2)], [[1, 2][i] for i in range(2)]\n"
        ),
        ([3, 3], [1, 2]),
        ("controls", "unread", "[3, 3]"),
    ),
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    return Project(tmp_path, monkeypatch)


def source_of(amalgam: Amalgam, answer: Any, gone: tuple[str, ...]) -> str:
    """The source of a program that gives the answer and has none of these words."""
    assert run(amalgam) == answer
    assert [word for word in gone if word in amalgam.source] == []
    return amalgam.source


@pytest.mark.parametrize("name", CHANGING)
def test_what_only_looks_constant_is_not_folded(name: str, project: Project) -> None:
    main, expected = CHANGING[name]
    project.write(main=main)
    assert run(project.amalgamate()) == expected


@pytest.mark.parametrize("name", GOING)
def test_what_is_constant_or_unread_goes(name: str, project: Project) -> None:
    main, answer, gone = GOING[name]
    project.write(main=main)
    source_of(project.amalgamate(), answer, gone)


def test_a_parameter_that_nobody_reads_goes_with_its_arguments(project: Project) -> None:
    project.write(
        main="def deep(x, unread_one): return x\n"
        "def loud(seen):\n    seen.append(1)\n    return 5\n"
        "def kept(x, unread_two): return x\n"
        "def outer(x, unread_three=3): return deep(x, unread_three)\n"
        "def main():\n    seen = []\n    return outer(1), outer(2, unread_three=7), kept(3, loud(seen)), seen\n"
    )
    source = source_of(project.amalgamate(), (1, 2, 3, [1]), gone=("unread_one", "unread_three"))
    assert "unread_two" in source  # working out its argument does something


def test_a_method_is_trimmed_only_if_no_other_object_has_one_of_its_name(project: Project) -> None:
    project.write(
        main="class Own:\n    def weigh(self, unread_one): return 1\n    def append(self, unread_two): return 2\n"
        "def main():\n    seen = []\n    seen.append(3)\n    own = Own()\n"
        "    return own.weigh(0), own.append(0), seen\n"
    )
    source = source_of(project.amalgamate(), (1, 2, [3]), gone=("unread_one",))
    assert "unread_two" in source


@pytest.mark.parametrize(
    "more",
    ["path = Path(np.arange(3), 1)\n", "path = replace(Path(np.arange(3)), lattice=1)\n"],
    ids=["made", "remade"],
)
def test_a_field_that_one_record_sets_is_not_folded(more: str, project: Project) -> None:
    project.write(main=PATH + f"def main():\n    {more}    return size(copied(path, path.lattice))\n")
    assert run(project.amalgamate()) == -1


def test_an_attribute_that_a_librarys_objects_have_too_is_not_folded(project: Project) -> None:
    project.write(
        main=RECORDS + "@dataclass\nclass Own:\n    ndim: int = 7\n"
        "def main():\n    return [each.ndim for each in (np.zeros((2, 2)), Own())]\n"
    )
    assert run(project.amalgamate()) == [2, 7]


def test_settings_that_all_objects_agree_on_are_known_wherever_one_is_declared(project: Project) -> None:
    project.write(
        main=RECORDS + "class Known:\n    width = 4\n@dataclass\nclass Entry:\n    known: Known\n"
        "def shout(): return undefined_here\n"
        "def widths(entries):\n    return [shout() if each.known.loud else each.known.width for each in entries]\n"
        "def main():\n    return widths([Entry(Known())])\n"
    )
    facts = Facts({f"{project.name}.main:Known": Partly({"loud": False})}, objects=(Known(),))
    source_of(project.amalgamate(facts), [4], gone=("shout", "loud"))


def test_a_context_that_only_talks_goes_once_nothing_reads_it(project: Project) -> None:
    project.write(
        talk="from contextlib import contextmanager\n@contextmanager\ndef bar(total): yield print\n",
        main="from HERE.talk import bar\ndef main():\n    done = []\n"
        "    with bar(3) as advance:\n        for i in range(3):\n            done.append(i)\n            advance(1)\n"
        "    for _ in range(2):\n        advance(1)\n    return done\n",
    )
    amalgam = project.amalgamate(silent=("HERE.talk:bar", "advance"))
    source = source_of(amalgam, [0, 1, 2], gone=("range(2)",))
    assert not any(isinstance(each, ast.With) for each in ast.walk(ast.parse(source)))


def test_a_function_that_only_returns_its_argument_is_its_argument(project: Project) -> None:
    project.write(
        main="class Carry:\n    def carried(self, layer, x): return x\n"
        "def loud(seen):\n    seen.append(1)\n    return 5\n"
        "def main():\n    seen = []\n    carry = Carry()\n"
        "    return carry.carried(0, loud(seen)), carry.carried(loud(seen), 2), seen\n"
    )
    assert run(project.amalgamate()) == (5, 2, [1, 1])


def test_looking_at_a_librarys_objects_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "all_reduce" in foreign_names(["torch.distributed:barrier"])
