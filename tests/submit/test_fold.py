"""What is constant in a whole program is folded, what nobody reads goes, and nothing else changes."""

from __future__ import annotations

import ast
import warnings
from pathlib import Path

import pytest

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


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    return Project(tmp_path, monkeypatch)


def test_a_parameter_that_nobody_reads_goes_with_its_arguments(project: Project) -> None:
    project.write(
        main="def deep(x, unread_one): return x\n"
        "def loud(seen):\n    seen.append(1)\n    return 5\n"
        "def kept(x, unread_two): return x\n"
        "def outer(x, unread_three=3): return deep(x, unread_three)\n"
        "def main():\n    seen = []\n    return outer(1), outer(2, unread_three=7), kept(3, loud(seen)), seen\n"
    )
    amalgam = project.amalgamate()
    assert run(amalgam) == (1, 2, 3, [1])
    assert not any(word in amalgam.source for word in ("unread_one", "unread_three"))
    assert "unread_two" in amalgam.source  # working out its argument does something


def test_a_method_is_trimmed_only_if_no_other_object_has_one_of_its_name(project: Project) -> None:
    project.write(
        main="class Own:\n    def weigh(self, unread_one): return 1\n    def append(self, unread_two): return 2\n"
        "def main():\n    seen = []\n    seen.append(3)\n    own = Own()\n"
        "    return own.weigh(0), own.append(0), seen\n"
    )
    amalgam = project.amalgamate()
    assert run(amalgam) == (1, 2, [3])
    assert "unread_one" not in amalgam.source
    assert "unread_two" in amalgam.source


def test_a_field_that_nobody_reads_goes_and_one_of_a_tuple_stays(project: Project) -> None:
    project.write(
        main=RECORDS + "@dataclass\nclass Held:\n    values: np.ndarray\n    unread: str\n"
        "class Pair(NamedTuple):\n    left: int\n    right: np.ndarray\n"
        "@dataclass(frozen=True)\nclass Key:\n    name: str\n    place: int\n"
        "def total(left, right): return left + int(right.sum())\n"
        "def main():\n    held = Held(np.arange(3), 'why')\n"
        "    return total(*Pair(1, held.values)), len({Key('a', 1), Key('a', 2)})\n"
    )
    amalgam = project.amalgamate()
    assert run(amalgam) == (4, 2)
    assert "unread" not in amalgam.source


def test_a_field_that_no_record_sets_is_folded_through_all_that_copy_it(project: Project) -> None:
    project.write(
        main=PATH + "def main():\n    path = Path(np.arange(3))\n    return size(copied(path, path.lattice))\n"
    )
    amalgam = project.amalgamate()
    assert run(amalgam) == 3
    assert not any(word in amalgam.source for word in ("lattice", "crystal"))


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
    amalgam = project.amalgamate(facts)
    assert run(amalgam) == [4]
    assert not any(word in amalgam.source for word in ("shout", "loud"))


def test_a_context_that_only_talks_goes_once_nothing_reads_it(project: Project) -> None:
    project.write(
        talk="from contextlib import contextmanager\n@contextmanager\ndef bar(total): yield print\n",
        main="from HERE.talk import bar\ndef main():\n    done = []\n"
        "    with bar(3) as advance:\n        for i in range(3):\n            done.append(i)\n            advance(1)\n"
        "    for _ in range(2):\n        advance(1)\n    return done\n",
    )
    amalgam = project.amalgamate(silent=("HERE.talk:bar", "advance"))
    assert run(amalgam) == [0, 1, 2]
    assert not any(isinstance(each, ast.With) for each in ast.walk(ast.parse(amalgam.source)))
    assert "range(2)" not in amalgam.source


def test_a_local_that_would_only_be_set_where_it_is_set_already_is_none(project: Project) -> None:
    project.write(
        main="def split(pair): return undefined_here\n"
        "def main():\n    lanes = None\n    other = None\n    for i in range(3):\n"
        "        if lanes is not None:\n            lanes = split(lanes)\n"
        "        other = i if other is None else other + i\n    return lanes is None, other\n"
    )
    amalgam = project.amalgamate()
    assert run(amalgam) == (True, 3)
    assert "split" not in amalgam.source


def test_a_function_that_only_returns_its_argument_is_its_argument(project: Project) -> None:
    project.write(
        main="class Carry:\n    def carried(self, layer, x): return x\n"
        "def loud(seen):\n    seen.append(1)\n    return 5\n"
        "def main():\n    seen = []\n    carry = Carry()\n"
        "    return carry.carried(0, loud(seen)), carry.carried(loud(seen), 2), seen\n"
    )
    assert run(project.amalgamate()) == (5, 2, [1, 1])


def test_attributes_of_a_class_that_nothing_reads_go(project: Project) -> None:
    project.write(
        main="class Layer:\n    fused = None\n    width = 2\n"
        "    def run(self, x):\n        return self.fused(x) if self.fused is not None else x * self.width\n"
        "def main():\n    return Layer().run(3)\n"
    )
    amalgam = project.amalgamate()
    assert run(amalgam) == 6
    assert "fused" not in amalgam.source


def test_a_list_of_one_value_is_that_value_wherever_it_is_read(project: Project) -> None:
    project.write(
        main="class Known: pass\n"
        "class Model:\n    def controls(self, place): return None\n"
        "    def width(self, layer, seen):\n        unread: int = layer\n"
        "        return [3, 3][layer] if self.controls(layer) is None else seen.pop()\n"
        "def main():\n    return [Model().width(layer, []) for layer in range(2)], [[1, 2][i] for i in range(2)]\n"
    )
    amalgam = project.amalgamate()
    assert run(amalgam) == ([3, 3], [1, 2])
    assert not any(word in amalgam.source for word in ("controls", "unread", "[3, 3]"))


def test_looking_at_a_librarys_objects_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "all_reduce" in foreign_names(["torch.distributed:barrier"])
