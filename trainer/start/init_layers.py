"""Layers of a model that starts from another one: whose weights each copies, and which skip belongs to which visit.

A U-Net's visits give and take skips in pairs, so a layer that is put in shifts pairs and rows of `skip_weights`. Both
models' lists of visits are walked side by side: a visit of a copied layer must find the stream and the skip that it had
there. A new layer that starts as the identity leaves the stream as it is; the skip that it takes must be that same
stream (its gate then mixes equal things) or, without gates, weigh nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import comb
from typing import NamedTuple

from pgolf_post.errors import MismatchError
from trainer.model.architecture import ModelConfig
from trainer.model.visits import num_skips, split_visits
from trainer.start.init_settings import IDENTITY

MOST_PLACEMENTS = 5000


class Visited(NamedTuple):
    """One visit: its layer, and the row and the giver of the skip that it takes, if any."""

    layer: int
    row: int | None
    giver: int | None  # number of the visit that left the skip


@dataclass
class SkipRows:
    """Origin of each row of `skip_weights`: the other model's row, or None where no visit there had one."""

    origin: dict[int, int | None] = field(default_factory=dict)
    unchanged: bool = True  # whether all visits find the stream and the skip that they had

    def put(self, row: int, origin: int | None) -> None:
        """Settle a row's origin; two visits that disagree leave the first, and change the function."""
        self.unchanged &= self.origin.setdefault(row, origin) == origin


def visits_of(config: ModelConfig, active_loops: int) -> list[Visited]:
    """Return the visits of a graph with the skips that they take."""
    encoder, decoder = split_visits(config, active_loops)
    stored, givers = num_skips(config), list(range(len(encoder)))
    visits = [Visited(layer, None, None) for layer in encoder]
    for index, layer in enumerate(decoder):
        row = min(index, stored - 1) if config.reuse_last_skip else index
        takes = bool(givers) and 0 <= row < stored
        visits.append(Visited(layer, row, givers.pop()) if takes else Visited(layer, None, None))
    return visits


def skip_rows(base: ModelConfig, config: ModelConfig, layers: Sequence[int]) -> SkipRows:
    """Return the origin of each row of skips, over all graphs that both models have."""
    found, same_loops = SkipRows(), base.max_active_loops == config.max_active_loops
    for active_loops in range(config.max_active_loops + 1) if same_loops else (0,):
        _walk(visits_of(base, active_loops), visits_of(config, active_loops), config, layers, found)
    return found


def _walk(
    there: list[Visited], here: list[Visited], config: ModelConfig, layers: Sequence[int], found: SkipRows
) -> None:
    """Walk two lists of visits side by side, and settle the rows that visits of one graph take."""
    done, stream = 0, list[int]()  # visits of the base that lie behind; the same after each visit here
    for visit in here:
        origin = layers[visit.layer]
        match = there[done] if done < len(there) and there[done].layer == origin else None
        if match is None:
            found.unchanged &= origin == IDENTITY and _stays(visit, config, stream)
            if visit.row is not None:
                found.put(visit.row, None)
        else:
            _take(visit, match, config, stream, found)
            done += 1
        stream.append(done)
    found.unchanged &= done == len(there)


def _stays(visit: Visited, config: ModelConfig, stream: list[int]) -> bool:
    """Return whether a skip that a visit takes, with a new row, leaves the stream as it is."""
    if visit.giver is None:
        return True
    if not config.skip_gates:
        return config.skip_norm != "after"
    return config.skip_norm == "none" and stream[visit.giver] == stream[-1]


def _take(visit: Visited, match: Visited, config: ModelConfig, stream: list[int], found: SkipRows) -> None:
    """Settle the row of a copied layer's visit."""
    if visit.row is None or visit.giver is None:
        found.unchanged &= match.row is None
    elif match.row is None or match.giver is None:
        found.unchanged &= _stays(visit, config, stream)
        found.put(visit.row, None)
    else:
        found.unchanged &= stream[visit.giver] == match.giver + 1
        found.put(visit.row, match.row)


# ---- placement -----------------------------------------------------------------------------------------------------


def origins(base: ModelConfig, config: ModelConfig, given: Sequence[int] | None) -> tuple[int, ...]:
    """Return for each layer the base's layer that it copies, IDENTITY for a new one.

    Raises MismatchError for a list that does not fit, or fewer layers without a list.
    """
    if given is not None:
        if len(given) != config.num_layers:
            raise MismatchError(f"init.layers lists {len(given)} layers; model.num_layers is {config.num_layers}")
        if (highest := max(given)) >= base.num_layers:
            raise MismatchError(
                f"init.layers: the base has no layer {highest}; its layers are 0..{base.num_layers - 1}"
            )
        return tuple(given)
    if config.num_layers < base.num_layers:
        kept = ", ".join(map(str, range(config.num_layers)))
        raise MismatchError(
            f"the base has {base.num_layers} layers, model.num_layers is {config.num_layers}",
            hint=f"say which ones stay, for example --set 'init.layers=[{kept}]'",
        )
    placements = list(_placements(base.num_layers, config.num_layers))
    return next((one for one in placements if skip_rows(base, config, one).unchanged), placements[0])


def _placements(there: int, here: int) -> Iterator[tuple[int, ...]]:
    """Yield lists of origins with new layers put in, those near the middle first."""
    new, middle = here - there, (here - 1) / 2
    if comb(here, new) <= MOST_PLACEMENTS:
        chosen = sorted(combinations(range(here), new), key=lambda at: sum(abs(place - middle) for place in at))
    else:
        starts = sorted(range(there + 1), key=lambda start: abs(start + (new - 1) / 2 - middle))
        chosen = [tuple(range(start, start + new)) for start in starts]
    for at in chosen:
        old = iter(range(there))
        yield tuple(IDENTITY if place in at else next(old) for place in range(here))
