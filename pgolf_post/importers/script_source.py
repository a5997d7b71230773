"""Facts about the model that only the source of its public script says, which the log file begins with.

Scripts write their own code into the log before anything else. No hyperparameter says whether the smear gate stops at
BOS; the code does: lines that apply the gate compare tokens with BOS, or do not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

APPLIED = re.compile(r"smear_lambda.*\bsigmoid\b|\bsigmoid\b.*smear_lambda|smear_lambda\.to\b")
STOPS = re.compile(r"bos", re.IGNORECASE)
COMMENT = re.compile(r"#.*")
REACH = 4  # lines before and after the one that applies the gate
LONGEST = 200  # characters of a line: more is minified code, whose lines hold more than one thing


def smear_across_bos(lines: Sequence[str]) -> bool | None:
    """Return whether the smear gate in a script's code mixes across BOS.

    None if there is no such code, if it is minified, or if places differ.
    """
    code = [COMMENT.sub("", line) for line in lines]
    places = [i for i, line in enumerate(code) if APPLIED.search(line)]
    if any(len(code[i]) > LONGEST for i in places):
        return None
    mixes = {not STOPS.search("\n".join(code[max(0, i - REACH) : i + REACH + 1])) for i in places}
    return mixes.pop() if len(mixes) == 1 else None
