"""The handed-in file is the readable program with short names, and does the same."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from pgolf_post.pack.script import has_minifier, minify
from pgolf_post.submit.packed import KEPT, packed, shortened

SOURCE = '''
from dataclasses import dataclass, replace

@dataclass(frozen=True)
class Rectangle:
    """A field is given by name, in `replace`: it keeps its name."""

    width_in_all: int
    height_in_all: float = 2.0

    def grown(self, larger_by, and_higher_by=1):
        return replace(self, width_in_all=self.width_in_all + larger_by + and_higher_by)

def spoken_to(first_one, second_one, **named_ones):
    return first_one, second_one, named_ones

def main():
    rectangle = Rectangle(3).grown(4, and_higher_by=5)
    print(rectangle, spoken_to(1, second_one=2, **{"third_one": 3}))

if __name__ == "__main__":
    main()
'''


def test_the_shortened_program_does_the_same(tmp_path: Path) -> None:
    outputs = []
    for name, text in (("readable.py", SOURCE.encode()), ("packed.py", packed(SOURCE).data)):
        (tmp_path / name).write_bytes(text)
        done = subprocess.run([sys.executable, name], cwd=tmp_path, capture_output=True, text=True, check=True)
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1].replace(outputs[1].partition("(")[0], "Rectangle")


@pytest.mark.skipif(not has_minifier(), reason="needs python-minifier")
def test_a_parameter_that_a_call_names_keeps_its_name_and_no_other_does() -> None:
    tree = ast.parse(minify(shortened(SOURCE), KEPT))
    names = {each.arg for each in ast.walk(tree) if isinstance(each, ast.arg)}
    assert {"and_higher_by", "second_one"} <= names
    assert not {"larger_by", "first_one", "self"} & names
