"""Inputs of matrices in numbers: the largest by channel, and the 99.9th percentile of a sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pgolf_post.calibrate.forward import hooks
from pgolf_post.diagnose.numbers import Number, number
from pgolf_post.families import ModelFamily, Site

SAMPLED = 1 << 16  # values of each batch and visit from which the percentile is taken


@dataclass
class SiteInputs:
    """Sums kept of one site's inputs."""

    largest: Tensor | None = None  # (in,)
    sample: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor) -> None:  # (…, in)
        """Take in one input."""
        flat = x.detach().flatten(0, -2).float().abs()
        largest = flat.amax(dim=0).cpu()
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)
        stride = max(1, flat.numel() // SAMPLED) | 1  # odd: no channel of an even width is left out
        self.sample.append(flat.flatten()[::stride].cpu())


class InputWatch:
    """The inputs of every site."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = {site.name: site for site in sites}
        self.inputs = {name: SiteInputs() for name in self.sites}

    @contextmanager
    def watching(self, module: nn.Module) -> Iterator[None]:
        """Take in what passes inside the block; the head's input is added by the caller."""

        def hook_for(name: str) -> Callable[..., None]:
            return lambda _, inputs: self.inputs[name].add(inputs[0])

        inside = [site for site in self.sites.values() if not site.is_head]
        with hooks(module.get_submodule(site.module).register_forward_pre_hook(hook_for(site.name)) for site in inside):
            yield

    def add_head(self, hidden: Tensor) -> None:
        """Take in the head's input."""
        for site in self.sites.values():
            if site.is_head:
                self.inputs[site.name].add(hidden)

    def numbers(self, family: ModelFamily) -> list[Number]:
        """Return the numbers of every site that was reached."""
        found: list[Number] = []
        for name, inputs in self.inputs.items():
            if inputs.largest is None:
                continue
            places = {"layer": family.layer(self.sites[name].tensors[0])}
            channel, usual = int(inputs.largest.argmax()), percentile(torch.cat(inputs.sample), 0.999)
            peak, median = float(inputs.largest.max()), float(inputs.largest.median())
            found += [
                number("input_max", name, peak, at=channel, **places),
                number("input_p999", name, usual, **places),
                number("input_peak", name, peak / median if median > 0 else None, at=channel, **places),
            ]
        return found


def percentile(values: Tensor, share: float) -> float:  # (n,)
    """Return the smallest value that at least this share of the values does not exceed."""
    rank = min(len(values), max(1, -int(-share * len(values) // 1)))
    return float(values.kthvalue(rank).values)
