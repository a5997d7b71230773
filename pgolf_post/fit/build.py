"""One constant c in, a quantized model out: the function that the byte budget is solved for.

What does not depend on c (sensitivities, factorized moments, relative steps) is made once and kept; a build is then one
pass of GPTQ over all matrices. Only what some linear map reads or a table looks up is quantized so; the rest, gains and
mixes, stays float.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from pgolf_post.base.progress import progress_bar
from pgolf_post.calibrate import Stats
from pgolf_post.checkpoint import View
from pgolf_post.fit.sensitivity import Sensitivity, sensitivities
from pgolf_post.fit.settings import FitSettings
from pgolf_post.fit.steps import UNION_GRID, RelativeSteps, relative_steps
from pgolf_post.plan import KeepRule, TensorPlan
from pgolf_post.quantize.gptq.driver import Job, gptq_jobs
from pgolf_post.quantize.gptq.factorize import FactorCache, LDLFactor
from pgolf_post.quantize.gptq.trellis import Trellis
from pgolf_post.quantize.rows import as_matrix, entropy_bits, keep_tensor
from pgolf_post.quantize.tensor import QuantizedModel, QuantizedTensor, ScaleFactor, scale_of, smallest_dtype

ZERO_ENERGY = 1 / 12  # σ² in squared steps, below which rounding leaves more error than zeros do
ZEROING = 127  # the exponent of a step so large that everything rounds to zero
SMALLEST_DAMP = 1e-6  # the ridge has made the moments positive definite already


@dataclass(frozen=True)
class Part:
    """What is known of one matrix before c is."""

    name: str
    role: str
    weight: Tensor  # (out, in) float32
    sensitivity: Sensitivity
    factor: LDLFactor  # of the inputs' moments
    row_factor: LDLFactor | None  # of the outputs'; None: rows are not coupled
    shape: RelativeSteps

    @property
    def num_weights(self) -> int:
        return self.weight.numel()


class Builder:
    """Builds quantized models of one view for any c."""

    def __init__(self, view: View, stats: Stats, settings: FitSettings) -> None:
        """Raises MismatchError, NumericsError as `sensitivity` and `factorize` do."""
        stats.require_view(view.id)
        self.view, self.stats, self.settings = view, stats, settings
        family, module = view.family, view.module
        sites = family.sites(module)
        tables = [lookup.tensor for lookup in family.lookups(module)]
        names = dict.fromkeys([tensor for site in sites for tensor in site.tensors] + tables)
        self.roles = {name: family.role(name) for name in view.tensors}
        minded = sensitivities(names, sites, stats, settings)
        self.parts = self._parts(names, minded)
        rule = KeepRule(name="float", dtype=settings.floats)
        self.passthrough = {
            name: keep_tensor(TensorPlan(name, self.roles[name], rule, None, None), tensor)
            for name, tensor in view.tensors.items()
            if name not in self.parts
        }

    @property
    def num_weights(self) -> int:
        """Of all matrices."""
        return sum(part.num_weights for part in self.parts.values())

    def _parts(self, names: Iterable[str], minded: Mapping[str, Sensitivity]) -> dict[str, Part]:
        couplings = {name: one.coupling for name, one in minded.items() if one.coupling is not None}
        inputs, outputs = FactorCache(lambda name: minded[name].moments), FactorCache(couplings.__getitem__)
        inputs.fill(names, SMALLEST_DAMP, act_order=True)
        outputs.fill(couplings, SMALLEST_DAMP, act_order=False)
        found = {}
        for name in names:
            factor = inputs.get(name, SMALLEST_DAMP, act_order=True)
            row_factor = outputs.get(name, SMALLEST_DAMP, act_order=False) if name in couplings else None
            rows = minded[name].rows if row_factor is None else row_factor.lengths.double().square()
            shape = relative_steps(rows, factor.column_lengths, self.settings.columns)
            weight = as_matrix(self.view.tensors[name].float())
            found[name] = Part(name, self.roles[name], weight, minded[name], factor, row_factor, shape)
        return found

    def quantize(
        self,
        constants: Mapping[str, float],  # name → c/√κ
        weights: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> dict[str, QuantizedTensor]:
        """The named matrices, each by its own constant; other weights than the view's may stand in for them."""
        factors = {name: self._factors(name, constant) for name, constant in constants.items()}
        parts = {name: self._part(name, weights) for name in constants}
        jobs = [self._job(part, factors[name]) for name, part in parts.items()]
        with progress_bar("quantizing", sum(job.weight.numel() for job in jobs)) as advance:
            found = gptq_jobs(jobs, advance=advance)
        return {
            job.name: self._finish(parts[job.name], symbols, factors[job.name], job.trellis, constants[job.name])
            for job, symbols in zip(jobs, found, strict=True)
        }

    def _part(self, name: str, weights: Mapping[str, Tensor]) -> Part:
        part = self.parts[name]
        return replace(part, weight=as_matrix(weights[name].float())) if name in weights else part

    def rounding_error(self, name: str, constant: float) -> float:
        """The rms error that rounding one matrix at c/√κ makes in its weights."""
        steps = scale_of(self._factors(name, constant), *self.parts[name].weight.shape)
        return float(np.sqrt(np.mean(np.square(steps, dtype=np.float64)) / 12))

    def model(self, quantized: Mapping[str, QuantizedTensor]) -> QuantizedModel:
        """A whole model."""
        lineage = {"checkpoint_id": self.view.id[:12], **self.stats.lineage()}
        ordered = {name: quantized[name] for name in self.parts}
        return QuantizedModel(self.view.config, lineage, ordered, self.passthrough)

    def _factors(self, name: str, constant: float) -> tuple[ScaleFactor, ...]:
        finer, part = UNION_GRID if self.settings.trellis_states else 1.0, self.parts[name]
        factors = part.shape.factors(constant * finer, name)
        return with_zeros(part.weight, factors, finer) if self.settings.zeros else factors

    def _job(self, part: Part, factors: tuple[ScaleFactor, ...]) -> Job:
        steps = torch.from_numpy(scale_of(factors, *part.weight.shape))
        states = self.settings.trellis_states
        trellis = Trellis(states, min(self.settings.lane_rows, max(1, len(part.weight)))) if states else None
        row_feedback = None if part.row_factor is None else part.row_factor.feedback
        return Job(part.name, part.weight, part.factor, steps, None, trellis, row_feedback=row_feedback)

    def _finish(
        self, part: Part, symbols: Tensor, factors: tuple[ScaleFactor, ...], trellis: Trellis | None, constant: float
    ) -> QuantizedTensor:
        array = smallest_dtype(symbols.numpy())
        shape = tuple(self.view.tensors[part.name].shape)
        made = QuantizedTensor(part.name, array, factors, shape, trellis)
        if self.settings.shrink:
            made = _towards_centroid(made, part)
        error = torch.from_numpy(made.dequantize()).view_as(part.weight) - part.weight
        facts = {
            "method": "fit",
            "role": part.role,
            "weights": part.num_weights,
            "constant": constant,
            "damp_used": part.factor.damp,
        }
        facts |= {"entropy_bits": entropy_bits(array), "predicted_loss": part.sensitivity.loss(error)}
        return replace(made, facts=facts)


def with_zeros(weight: Tensor, factors: tuple[ScaleFactor, ...], finer: float) -> tuple[ScaleFactor, ...]:
    """Factors under which columns, and rows of a scalar grid, whose steps exceed √12·σ become nothing but zeros.

    There Δ²/12 exceeds σ²: a Gaussian is worth no bits at all (reverse water-filling). A trellis has no zero in every
    state, so its rows stay; a column of zeros is a path of it.
    """
    energy = np.square(weight.numpy() / scale_of(factors, *weight.shape) * finer)  # in steps of the scalar grid
    quiet = {"column": energy.mean(axis=0) < ZERO_ENERGY, "row": (energy.mean(axis=1) < ZERO_ENERGY) & (finer == 1)}
    return tuple(
        replace(factor, values=np.where(quiet[factor.axis], ZEROING, factor.values).astype(np.int8))
        if factor.axis in quiet
        else factor
        for factor in factors
    )


def _towards_centroid(made: QuantizedTensor, part: Part) -> QuantizedTensor:
    """The tensor factor times the α that minimises the loss of W - α·Ŵ: uniform grids decode a little too far out."""
    restored = torch.from_numpy(made.dequantize()).view_as(part.weight).double()
    minded = part.sensitivity.pull(restored)
    energy = float((minded * restored).sum())
    alpha = float((minded * part.weight).sum()) / energy if energy > 0 else 1.0
    tensor, *others = made.factors
    scaled = (alpha * tensor.values.astype(np.float32)).astype(np.float16)
    return replace(made, factors=(ScaleFactor("tensor", scaled), *others))


def constants_of(names: Iterable[str], constant: float, kappa: Mapping[str, float]) -> dict[str, float]:
    """c/√κ of each matrix."""
    return {name: constant / kappa.get(name, 1.0) ** 0.5 for name in names}
