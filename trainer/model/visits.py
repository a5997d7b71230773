"""The order of visits to blocks: the list that is active, its two halves, and what follows from them.

The list is given in shorthand (blocks a..b, n extra times) or in full. Its first half, the encoder, leaves outputs that
its second half, the decoder, takes back as skips.
"""

from __future__ import annotations

from collections import Counter

from trainer.model.parts import Whole


def visit_list(config: Whole, active_loops: int) -> list[int]:
    """Return layers in order of visit: [0..a-1] + (active_loops + 1)·[a..b] + [b+1..n-1], or the explicit list."""
    layers = list(range(config.num_layers))
    if not active_loops:
        return layers
    if config.visits is not None:
        return list(config.visits)
    a, b = config.loop_start, config.loop_end
    return layers[:a] + layers[a : b + 1] * (active_loops + 1) + layers[b + 1 :]


def num_places(config: Whole) -> int:
    """Return the number of visits in the longest list."""
    return max(len(visit_list(config, active)) for active in {0, config.max_active_loops})


def split_visits(config: Whole, active_loops: int) -> tuple[list[int], list[int]]:
    """Return the encoder half, whose outputs are kept, and the decoder half.

    The encoder has encoder_visits visits, by default floor(n / 2).
    """
    visits = visit_list(config, active_loops)
    size = len(visits) // 2 if config.encoder_visits is None else config.encoder_visits
    return visits[:size], visits[size:]


def num_skips(config: Whole) -> int:
    """Return the number of stored skip weights."""
    return usable_skips(config) if config.stored_skips is None else config.stored_skips


def usable_skips(config: Whole) -> int:
    """Return the largest number of skips that any of the config's visit lists can use."""
    halves = (split_visits(config, active) for active in {0, config.max_active_loops})
    return max(min(len(encoder), len(decoder)) for encoder, decoder in halves)


def revisits(config: Whole) -> dict[int, int]:
    """Return layer → number of re-visits in the full list, for layers that have any, ascending."""
    counts = Counter(visit_list(config, config.max_active_loops))
    return {layer: counts[layer] - 1 for layer in sorted(counts) if counts[layer] > 1}


def looped_layers(config: Whole) -> list[int]:
    """Return the layers that the full list visits more than once, ascending."""
    return list(revisits(config))


def visits_in_lanes(config: Whole, active_loops: int) -> list[int]:
    """Return the decoder half from the visit on at which the residual lanes split."""
    decoder = split_visits(config, active_loops)[1]
    split = [i for i, layer in enumerate(decoder) if config.lanes_start and layer >= config.lanes_start]
    return decoder[split[0] :] if split else []


def is_left_behind(config: Whole, layer: int) -> bool:
    """Return whether a visit of a layer after the lanes split has the old stream, not the lanes."""
    return config.lane_kind == "routed" and layer < (config.lanes_start or 0)


def visit_after_lanes(config: Whole) -> int | None:
    """Return the first layer below lanes_start that some list visits after the lanes split; None without one."""
    lists = (visits_in_lanes(config, active_loops) for active_loops in range(config.max_active_loops + 1))
    return next((layer for late in lists for layer in late if layer < (config.lanes_start or 0)), None)


def visit_before_lanes(config: Whole) -> int | None:
    """Return the first layer from lanes_start on that some list visits in its encoder half; None without one."""
    start = config.lanes_start or config.num_layers
    early = (split_visits(config, active_loops)[0] for active_loops in range(config.max_active_loops + 1))
    return next((layer for visits in early for layer in visits if layer >= start), None)


def revisit_in_lanes(config: Whole) -> int | None:
    """Return the first layer that some list re-visits after the lanes split, or None."""
    for active_loops in range(1, config.max_active_loops + 1):
        visits, late = visit_list(config, active_loops), visits_in_lanes(config, active_loops)
        for i in range(len(visits) - len(late), len(visits)):
            if visits[i] in visits[:i]:
                return visits[i]
    return None
