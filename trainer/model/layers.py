"""Settings that differ from layer to layer: one value for all of them, or a list with one for each.

Scripts thin out single blocks (no MLP in the last one, no attention in the first), rotate layers with bases of their
own or not at all (NoPE, Kazemnejad et al. 2023), and start heads at different sharpness. Everything that builds a layer
asks here what its layer has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pydantic import Field
from torch import Tensor

from trainer.model.activations import activation_of
from trainer.model.parts import Part, Whole

Value = TypeVar("Value")


class LayerSettings(Part):
    """Layers that have, or do without, a part that all others have."""

    attn_layers: tuple[int, ...] | None = Field(None, description="layers that have attention; default all")
    xsa_layers: tuple[int, ...] | None = Field(
        None, description="layers with XSA, in place of xsa_last_n; with visit_controls, places in the list of visits"
    )
    xsa_alpha: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="starting share of its own value that XSA removes, learned for each layer; default all, fixed",
    )
    nope_layers: tuple[int, ...] = Field((), description="layers whose queries and keys are not rotated")


# ---- what a layer has ----------------------------------------------------------------------------------------------


def by_layer(value: Value | tuple[Value, ...], num_layers: int) -> list[Value]:
    """Return a setting's value in each layer."""
    return list(value) if isinstance(value, tuple) else [value] * num_layers


def mlp_widths(config: Whole) -> list[int]:
    """Return the hidden width of each layer's MLP; 0 where there is none."""
    if config.mlp_hidden is not None:
        return by_layer(config.mlp_hidden, config.num_layers)
    return [int(mult * config.model_dim) for mult in by_layer(config.mlp_mult, config.num_layers)]


def activation_names(config: Whole) -> list[str]:
    """Return the name of each layer's activation."""
    return by_layer(config.activation, config.num_layers)


def bound_activations(config: Whole) -> list[tuple[bool, Callable[[Tensor], Tensor]]]:
    """Return of each layer's activation whether it is gated, and its function of x alone."""
    rows = [activation_of(name) for name in activation_names(config)]
    return [(row.gated, row.bind(config)) for row in rows]


def with_attention(config: Whole) -> list[bool]:
    """Return whether each layer has attention."""
    listed = range(config.num_layers) if config.attn_layers is None else config.attn_layers
    return [layer in listed and (layer > 0 or config.first_attention) for layer in range(config.num_layers)]


def has_xsa(config: Whole, place: int, num_places: int) -> bool:
    """Return whether XSA acts at a place, one of `num_places`: layers, or places in the list of visits."""
    return place >= num_places - config.xsa_last_n if config.xsa_layers is None else place in config.xsa_layers


def query_gains(config: Whole) -> list[list[float]]:
    """Return the starting gain of each head's query in each layer."""
    rows: Any = by_layer(config.q_gain_init, config.num_layers)
    if len(rows) == 1:
        rows = list(rows) * config.num_layers  # one list of heads for all layers
    return [list(row) if isinstance(row, tuple) else [row] * config.num_heads for row in rows]


def rotations(config: Whole) -> list[tuple[int, float]]:
    """Return the rotated dimensions and the rotary base of each layer; no dimension where it is not rotated."""
    head_dim = config.model_dim // config.num_heads
    dims = by_layer(config.rope_dims, config.num_layers)
    bases = by_layer(config.rope_base, config.num_layers)
    return [
        (0 if layer in config.nope_layers else dims[layer] or head_dim, bases[layer])
        for layer in range(config.num_layers)
    ]


# ---- checks --------------------------------------------------------------------------------------------------------


def check_layers(key: str, layers: Sequence[int], num_layers: int) -> None:
    """Raise ValueError naming the first entry that is no layer."""
    for layer in layers:
        if not 0 <= layer < num_layers:
            raise ValueError(f"{key}: {layer} is not a layer; layers are 0..{num_layers - 1}")


def check_listed_once(key: str, layers: Sequence[int], num_layers: int) -> None:
    """Raise ValueError for an entry that is no layer, or one that is listed twice."""
    check_layers(key, layers, num_layers)
    if len(layers) != len(set(layers)):
        raise ValueError(f"{key} names a layer twice: {list(layers)}")


def check_lengths(settings: Whole) -> None:
    """Raise ValueError naming each list that has not one value for each layer."""
    for key in ("mlp_mult", "mlp_hidden", "activation", "rope_base", "rope_dims", "q_gain_init"):
        value = getattr(settings, key)
        one_row = isinstance(value, tuple) and len(value) == 1 and isinstance(value[0], tuple)  # heads, for all layers
        if isinstance(value, tuple) and len(value) != settings.num_layers and not one_row:
            raise ValueError(f"{key} lists {len(value)} values; num_layers is {settings.num_layers}")


def check_values(settings: Whole) -> None:
    """Raise ValueError naming the first value of a list that is out of its range, with its layer and the limit."""
    head_dim = settings.model_dim // settings.num_heads
    for layer, (dims, base) in enumerate(rotations(settings)):
        if base <= 1:
            raise ValueError(f"rope_base {base} of layer {layer} must be above 1")
        if not 0 <= dims <= head_dim or dims % 2 or head_dim % 2:
            raise ValueError(f"rope_dims {dims} must be even and at most the (even) head width {head_dim}")
        if settings.rope_ntk and dims == 2:
            raise ValueError("rope_ntk needs at least 4 rotated dimensions per head, got 2; set rope_ntk = false")
    for row in query_gains(settings):
        if len(row) != settings.num_heads:
            raise ValueError(f"q_gain_init lists {len(row)} heads; num_heads is {settings.num_heads}")
    for layer, mult in enumerate(by_layer(settings.mlp_mult, settings.num_layers)):
        if mult < 0 or (mult and settings.mlp_hidden is None and int(mult * settings.model_dim) < 1):
            raise ValueError(f"mlp_mult {mult} of layer {layer} must be 0 (no MLP) or give at least one hidden unit")
    for layer, width in enumerate(mlp_widths(settings)):
        if width < 0:
            raise ValueError(f"mlp_hidden {width} of layer {layer} must be at least 0 (no MLP)")


def check_absent(settings: Whole) -> None:
    """Raise ValueError where what a layer lacks cannot be, or where a list says nothing."""
    for key in ("attn_layers", "nope_layers"):
        check_listed_once(key, getattr(settings, key) or (), settings.num_layers)
    widths, attends = mlp_widths(settings), with_attention(settings)
    for layer in range(settings.num_layers):
        if not widths[layer] and not attends[layer]:
            raise ValueError(f"layer {layer} has neither attention nor an MLP")
    if settings.visit_controls and (settings.attn_layers is not None or not all(widths)):
        raise ValueError("visit_controls gives gains to every visit: attn_layers and mlp_mult 0 do not go with it")
    if settings.visit_controls and settings.xsa_alpha is not None:
        raise ValueError("xsa_alpha is one share for each layer; visit_controls has gains of visits")
    used = settings.xsa_last_n if settings.xsa_layers is None else settings.xsa_layers
    if settings.xsa_alpha is not None and not used:
        raise ValueError(f"xsa_alpha {settings.xsa_alpha} does nothing without XSA: set xsa_layers or xsa_last_n")
