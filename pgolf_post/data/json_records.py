"""JSON as records are read from it: what is not JSON, or says two things at once, is an error in plain words."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

KINDS = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}


class JSONFault(ValueError):
    """Text that is not valid JSON, or an object with one key twice."""


def parse_json(text: str) -> Any:
    """Return the value of a JSON text. Raises JSONFault."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno} column {error.colno}"
        raise JSONFault(f"not valid JSON: {error.msg.removesuffix(' at')} at {place}") from None
    except RecursionError:
        raise JSONFault("not readable as JSON: it is nested too deeply") from None
    except JSONFault:
        raise
    except ValueError:  # Python's own limit
        raise JSONFault("not readable as JSON: it has a number of more than 4,300 digits") from None


def json_kind(value: Any) -> str:
    """Return the kind of a JSON value, with its article."""
    return "null" if value is None else KINDS[type(value)]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object. Raises JSONFault if a key stands twice: readers differ in which of the two they take."""
    made = dict(pairs)
    if len(made) != len(pairs):
        key, count = Counter(key for key, _ in pairs).most_common(1)[0]
        raise JSONFault(f"the key {json.dumps(key)} stands {count} times in one object")
    return made
