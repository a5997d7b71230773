"""Renaming tensors between formats by the ends of their names."""

from __future__ import annotations

from collections.abc import Mapping


def rename(name: str, suffixes: Mapping[str, str]) -> str:
    """`name` with the first matching suffix replaced; unchanged if none matches."""
    for old, new in suffixes.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name
