"""One file from many modules does what they do, and holds only what the program reaches under what is known of it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from pgolf_post.errors import MismatchError
from tests.submit.project import Known, Project, run


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    return Project(tmp_path, monkeypatch)


def test_one_name_in_two_modules_stays_two_things(project: Project) -> None:
    project.write(
        a="def size(): return 'a'\n",
        b="def size(): return 'b'\ndef both(): return size()\n",
        main="from HERE.a import size\nfrom HERE import b\nfrom HERE.b import both as size_of_b\n"
        "def main():\n    return size(), b.size(), size_of_b()\n",
    )
    assert run(project.amalgamate()) == ("a", "b", "b")


def test_a_local_name_hides_the_global_one_and_nothing_else_does(project: Project) -> None:
    project.write(
        a="def value(): return 'global'\n",
        main="from HERE.a import value as other\n"
        "def hidden(value): return value\n"
        "def beside():\n    value = 'local'\n    return value, other()\n"
        "def main():\n    return hidden('given'), beside(), [other for other in (1, 2)], other()\n",
    )
    assert run(project.amalgamate()) == ("given", ("local", "global"), [1, 2], "global")


def test_names_imported_inside_functions_and_through_packages_are_followed(project: Project) -> None:
    project.write(
        deep="import math as m\ndef area(r): return m.floor(m.pi * r)\n",
        shallow="from HERE.deep import area\n",
        main="def main():\n    from HERE.shallow import area as f\n    import json\n    return json.dumps(f(2))\n",
    )
    amalgam = project.amalgamate()
    assert run(amalgam) == "6"
    assert amalgam.external == ("json", "math")


def test_what_only_other_settings_would_need_is_not_there(project: Project) -> None:
    project.write(
        a="def shout(): return undefined_here\n",
        main="from HERE.a import shout\nclass Known: pass\n"
        "class Thing:\n"
        "    def __init__(self, known: Known):\n        self.known = known\n"
        "    def used(self):\n        return shout() if self.known.loud else list(range(self.known.width))\n"
        "    def unused(self):\n        return shout()\n"
        "def main(known: Known = None):\n    if known.loud and shout():\n        return shout()\n"
        "    return Thing(known).used()\n",
    )
    amalgam = project.amalgamate(project.knowing(Known()))
    assert run(amalgam) == [0, 1, 2]
    assert not any(word in amalgam.source for word in ("shout", "unused", "loud"))
    with pytest.raises(NameError):
        run(project.amalgamate(project.knowing(Known(loud=True))))


def test_a_guard_still_stops_the_program(project: Project) -> None:
    project.write(
        main="class WrongError(Exception): pass\n"
        "def half(n):\n    if n % 2:\n        why = f'{n} is odd'\n        raise WrongError(why)\n    return n // 2\n"
        "def main():\n    return half(4), half\n"
    )
    value, half = run(project.amalgamate())
    assert value == 2
    with pytest.raises(AssertionError):
        half(3)


def test_a_list_that_grows_is_no_constant(project: Project) -> None:
    loop = "    for i in range(3):\n        seen.append(i)\n"
    project.write(main=f"def main():\n    seen = []\n{loop}    return bool(seen), seen\n")
    assert run(project.amalgamate()) == (True, [0, 1, 2])


def test_a_parameter_is_constant_only_if_every_call_says_so(project: Project) -> None:
    project.write(
        main="def scaled(x, by=2, shift=None):\n    return x * by if shift is None else x * by + shift\n"
        "def main():\n    return scaled(1), scaled(2, 3)\n"
    )
    amalgam = project.amalgamate()
    assert run(amalgam) == (2, 6)
    assert "is None" not in amalgam.source
    assert "* by" in amalgam.source


def test_handing_known_settings_to_what_does_not_know_them_is_refused(project: Project) -> None:
    project.write(
        main="class Known: pass\ndef width_of(thing): return thing.width\n"
        "def main(known: Known = None):\n    return width_of(known)\n"
    )
    with pytest.raises(MismatchError, match=r"main hands a known object to width_of\(thing\)"):
        project.amalgamate(project.knowing(Known()))


def test_definitions_come_before_what_needs_them_at_import(project: Project) -> None:
    project.write(
        z="from HERE.a import BASE\nclass Root:\n    number = BASE + 1\n",
        a="BASE = 41\n",
        main="from HERE.z import Root\nclass Leaf(Root):\n    pass\n"
        "ANSWER = Leaf.number\ndef main():\n    return ANSWER\n",
    )
    assert run(project.amalgamate()) == 42


def test_silent_calls_go_and_docstrings_stay_readable(project: Project) -> None:
    project.write(
        talk="def say(text): print(text)\n",
        main='from HERE.talk import say\ndef main():\n    """Add."""\n    say("adding")\n    return 1 + 1\n',
    )
    amalgam = project.amalgamate(silent=("HERE.talk:say",))
    assert run(amalgam) == 2
    assert "say" not in amalgam.source
    assert '"""Add."""' in amalgam.source


def test_a_program_is_python_that_imports_no_module_of_ours(project: Project) -> None:
    project.write(a="def one(): return 1\n", main="from HERE.a import one\ndef main(): return one()\n")
    tree = ast.parse(project.amalgamate().source)
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert project.name not in {name.partition(".")[0] for name in imported}
