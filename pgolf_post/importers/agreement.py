"""Shapes that agree: what must hold among the tensors of a model before settings are computed from them.

Width, heads and vocabulary stand in many tensors at once. One that is shaped otherwise (a query gain saved as a scalar,
a transposed matrix, an empty tensor) would make the settings wrong, and an error about settings would not name it. So
each number is what most tensors say, and those that say otherwise are named.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from pgolf_post.errors import MismatchError

WIDTH, HEADS, VOCABULARY, KV_WIDTH = "width", "heads", "vocabulary", "key-value width"
HIDDEN, EMBEDDING = "hidden width", "embedding width"
ANY = "…"
BLOCK = r"blocks\.(\d+)\."
SHAPES: dict[str, tuple[str, ...]] = {  # canonical names → dimensions; a number is one, a word is what others say too
    r"tok_emb\.weight|lm_head\.weight": (VOCABULARY, EMBEDDING),
    r"embed_proj\.weight": (WIDTH, EMBEDDING),
    r"head_proj\.weight": (EMBEDDING, WIDTH),
    rf"{BLOCK}attn\.(q|proj)\.weight": (WIDTH, WIDTH),
    rf"{BLOCK}attn\.[kv]\.weight": (KV_WIDTH, WIDTH),
    rf"{BLOCK}attn\.q_gain": (HEADS,),
    rf"{BLOCK}attn\.(gate|double_gate)": (HEADS, ANY),
    rf"{BLOCK}mlp\.(fc|gate)\.weight": (HIDDEN, WIDTH),
    rf"{BLOCK}mlp\.proj\.weight": (WIDTH, HIDDEN),
    rf"{BLOCK}(attn|mlp)_scale": (WIDTH,),
    rf"{BLOCK}resid_mix": ("2", WIDTH),
    r"smear_gate": ("1", ANY),
    r"bigram\.embed\.weight": (ANY, ANY),
    r"value_embed\.embed\.weight": (VOCABULARY, ANY),
}
FACTORED = ("embed_proj.weight", "head_proj.weight")
ROWS = re.compile(r"skip_weights|skip_gates")  # (any number, width): none in a model of one layer
RESAVE = "save the state dict again as model.state_dict() gives it"


PARTS = (("attn.q", "attn.k", "attn.v", "attn.proj"), ("mlp.fc", "mlp.proj"))  # matrices that none is without
LISTED = 8  # problems in one message


class Dimension(NamedTuple):
    """One dimension of one tensor."""

    tensor: str
    axis: int
    size: int


def require_agreement(tensors: Mapping[str, Tensor], source: str = "") -> None:
    """Raise MismatchError naming every canonical tensor whose shape does not go with those of the others."""
    problems, said = [], defaultdict[str, list[Dimension]](list)
    factored = any(name in tensors for name in FACTORED)
    for name, tensor in tensors.items():
        shape, expected = tuple(tensor.shape), _expected(name, factored)
        if expected is None:
            continue
        if len(shape) != len(expected) or (0 in shape and not ROWS.fullmatch(name)):
            problems.append(f"{name} is {shape}, expected {_words(expected)}")
            continue
        for axis, (word, size) in enumerate(zip(expected, shape, strict=True)):
            if word.isdecimal() and size != int(word):
                problems.append(f"{name} is {shape}, expected {_words(expected)}")
            elif word != ANY and not word.isdecimal():
                said[word].append(Dimension(name, axis, size))
    for word, dimensions in said.items():
        problems += _dissent(word, dimensions, tensors)
    problems = list(dict.fromkeys(problems)) or _heads(said)
    where = f"{source}: " if source else ""
    if problems:
        more = f"; and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise MismatchError(f"{where}shapes do not go together: {'; '.join(problems[:LISTED])}{more}", hint=RESAVE)
    absent = [name for part in PARTS for name in _absent(part, tensors)]
    if absent:
        raise MismatchError(f"{where}not a whole model: missing {', '.join(absent)}, beside which the others are there")


def _absent(part: tuple[str, ...], tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the matrices that are absent from blocks that have another matrix of the same part."""
    pattern = re.compile(rf"{BLOCK}({'|'.join(map(re.escape, part))})\.weight")
    blocks = sorted({int(match[1]) for name in tensors if (match := pattern.fullmatch(name))})
    names = [f"blocks.{block}.{matrix}.weight" for block in blocks for matrix in part]
    return [name for name in names if name not in tensors]


def _expected(name: str, factored: bool) -> tuple[str, ...] | None:
    """Return the dimensions of a tensor in words; None where no settings are computed from it.

    An embedding that is not `factored` is as wide as the model.
    """
    if ROWS.fullmatch(name):
        return (ANY, WIDTH)
    for pattern, words in SHAPES.items():
        if match := re.fullmatch(pattern, name):
            own = {HIDDEN: f"{HIDDEN} of block {match[1]}" if match.groups() else HIDDEN}
            own |= {} if factored else {EMBEDDING: WIDTH}
            return tuple(own.get(word, word) for word in words)
    return None


def _words(expected: tuple[str, ...]) -> str:
    return f"({', '.join(expected)}{',' if len(expected) == 1 else ''})"


def _dissent(word: str, dimensions: list[Dimension], tensors: Mapping[str, Tensor]) -> list[str]:
    """Return what is wrong with the tensors that say another number than most; all of them if there is no majority."""
    votes = Counter(dimension.size for dimension in dimensions).most_common()
    if len(votes) < 2:
        return []
    (size, count), (_, second) = votes[:2]
    if count == second:
        listed = ", ".join(f"{d.tensor} {tuple(tensors[d.tensor].shape)} says {d.size}" for d in dimensions[:8])
        return [f"no {word} on which most agree: {listed}{' …' if len(dimensions) > 8 else ''}"]
    others = f"{count} other{'s say' if count > 1 else ' says'} {size}"
    return [
        f"{d.tensor} is {tuple(tensors[d.tensor].shape)}: its dimension {d.axis} is the {word}, of which {others}"
        for d in dimensions
        if d.size != size
    ]


def _heads(said: Mapping[str, list[Dimension]]) -> list[str]:
    """Return what is wrong with the number of heads, which query gains say; keys and values are whole heads too."""
    if not (said[HEADS] and said[WIDTH] and said[KV_WIDTH]):
        return []  # not a whole model: its absent tensors are named elsewhere
    gain = next((d for d in said[HEADS] if d.tensor.endswith("q_gain")), said[HEADS][0])
    width, keys = said[WIDTH][0].size, said[KV_WIDTH][0]
    if width % gain.size:
        return [f"{gain.tensor} has {gain.size} gains, one for each head, which do not divide the width of {width}"]
    head_dim = width // gain.size
    if keys.size % head_dim or gain.size % (keys.size // head_dim):
        gains = f"{gain.size} gain{'s' if gain.size > 1 else ''}, one for each head"
        rows = f"{keys.tensor} has {keys.size} rows, expected {head_dim} times a number that divides {gain.size}"
        return [f"{gain.tensor} has {gains}, so a head has {width} / {gain.size} = {head_dim} channels; {rows}"]
    return []
