"""One file from many modules: the definitions that a program reaches, reduced by what is known of it.

`reach` finds and reduces them, `handed_over` checks that nothing reads what is known elsewhere, `one_file` writes them.
"""

from __future__ import annotations

from collections.abc import Iterable

from pgolf_post.submit.facts import Facts
from pgolf_post.submit.handed_over import check_known
from pgolf_post.submit.known import Evaluator
from pgolf_post.submit.one_file import Amalgam, written
from pgolf_post.submit.reach import Reach
from pgolf_post.submit.sources import Sources
from pgolf_post.submit.syntax import set_elsewhere
from pgolf_post.submit.world import remade_settings

__all__ = ["Amalgam", "amalgamate"]


def amalgamate(
    sources: Sources,
    entry: str,  # address of the function that is the program
    facts: Facts,
    silent: Iterable[str] = (),  # addresses of functions, or names of methods, whose calls only talk or check
    unused: Iterable[str] = (),  # methods that are not called, "module:Class.method", where another of the name is
) -> Amalgam:
    """Return the program that calls `entry`. Raises MismatchError for what cannot stand alone."""
    changed: frozenset[str] = frozenset()
    while True:
        evaluator = Evaluator(sources, facts, changed)
        reach = Reach(sources, entry, evaluator, frozenset(silent), frozenset(unused))
        reach.link()
        evaluator.forget()
        more = set_elsewhere(sources.definition(at) for at in reach.reached)
        more |= remade_settings(reach.reached.values(), facts.objects)
        if more <= changed:
            break
        changed |= more  # what was taken for known may not be: start again without it
    check_known(reach.reached, facts)
    return written(reach)
