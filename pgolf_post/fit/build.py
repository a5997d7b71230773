"""One constant c in, a quantized model out: the function that the byte budget is solved for.

What does not depend on c (sensitivities, factorized Hessians, relative steps) is made once and kept. A build is then
one pass of GPTQ over all matrices. Only matrices of linear maps and lookup tables are quantized; other parameters, such
as gains and mixes, stay float. Matrices that cost nothing as zeros are zeros in every build (idle.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from pgolf_post.base.progress import progress_bar
from pgolf_post.calibrate import Stats
from pgolf_post.checkpoint import View
from pgolf_post.fit.idle import as_zeros, zeros_loss, zeros_reason
from pgolf_post.fit.precondition import Roots, roots_of
from pgolf_post.fit.sensitivity import Sensitivity, sensitivities
from pgolf_post.fit.settings import FitSettings
from pgolf_post.fit.steps import RelativeSteps, relative_steps
from pgolf_post.plan import TensorPlan
from pgolf_post.quantize.gptq.driver import Job, gptq_jobs
from pgolf_post.quantize.gptq.factorize import FactorCache, LDLFactor
from pgolf_post.quantize.gptq.trellis import DIAGONALS, UNION_GRID, Trellis
from pgolf_post.quantize.rows import as_matrix, entropy_bits, keep_tensor
from pgolf_post.quantize.tensor import QuantizedModel, QuantizedTensor, ScaleFactor, scale_of, smallest_dtype
from pgolf_post.rules import KeepRule

ZERO_ENERGY = 1 / 12  # σ² in squared steps, below which rounding leaves more error than zeros do
ZEROING = 127  # the exponent of a step so large that everything rounds to zero
MOST_SYMBOL = 16000  # of an outlier; feedback from other columns needs room too
SMALLEST_DAMP = 1e-6  # the ridge has made the Hessians positive definite already


@dataclass(frozen=True)
class Matrix:
    """One matrix with what is known of it before c is chosen."""

    name: str
    role: str
    weight: Tensor  # (out, in) float32
    sensitivity: Sensitivity
    factor: LDLFactor  # of the inputs' Hessian
    row_factor: LDLFactor | None  # of the outputs' second moment; None: rows are not coupled
    steps: RelativeSteps

    @property
    def num_weights(self) -> int:
        return self.weight.numel()

    @cached_property
    def loss_of_zeros(self) -> float:  # nats per token
        """Loss that zeros in the matrix's place cause."""
        return self.sensitivity.loss(self.weight)


def rounded_names(view: View) -> dict[str, None]:
    """Return the names of a view's matrices: those of linear maps, by site, then lookup tables."""
    sites, lookups = view.family.sites(view.module), view.family.lookups(view.module)
    return dict.fromkeys([name for site in sites for name in site.tensors] + [lookup.tensor for lookup in lookups])


class Builder:
    """Builds quantized models of one view for any c."""

    def __init__(self, view: View, stats: Stats, settings: FitSettings) -> None:
        """Raises MismatchError, NumericsError as `sensitivity` and `factorize` do."""
        stats.require_view(view.id)
        self.view, self.stats, self.settings = view, stats, settings
        family, module = view.family, view.module
        sites = family.sites(module)
        names = rounded_names(view)
        self.roles = {name: family.role(name) for name in view.tensors}
        sensitivity = sensitivities(names, sites, stats, settings)
        self.zeros = self._zeros(sensitivity)
        self.matrices = self._matrices([name for name in names if name not in self.zeros], sensitivity)
        rule = KeepRule(name="float", dtype=settings.floats)
        self.passthrough = {
            name: keep_tensor(TensorPlan(name, self.roles[name], rule, None, None), tensor, "--floats bf16")
            for name, tensor in view.tensors.items()
            if name not in names
        }

    @property
    def num_weights(self) -> int:
        """Number of weights in all matrices that are rounded; those that are zeros in every build are not counted."""
        return sum(matrix.num_weights for matrix in self.matrices.values())

    @cached_property
    def roots(self) -> dict[str, Roots]:
        """Return every rounded matrix's roots, by which fine-tuning may be preconditioned."""
        with progress_bar("factorizing sensitivities", len(self.matrices), "matrices") as advance:
            roots = {}
            for name, matrix in self.matrices.items():
                roots[name] = roots_of(matrix.sensitivity)
                advance()
        return roots

    @property
    def identity(self) -> dict[str, list[str]]:
        """Entries of an id beside the settings: the matrices stored as zeros, if there are any."""
        return {"zeros": sorted(self.zeros)} if self.zeros else {}

    def _zeros(self, sensitivity: Mapping[str, Sensitivity]) -> dict[str, QuantizedTensor]:
        """Return the matrices that are stored as zeros."""
        zeros = {}
        for name, one in sensitivity.items():
            tensor = self.view.tensors[name]
            weight = as_matrix(tensor.float())
            if reason := zeros_reason(weight, one):
                zeros[name] = as_zeros(name, self.roles[name], tensor, zeros_loss(weight, one), reason)
        return zeros

    def _matrices(self, names: Iterable[str], sensitivity: Mapping[str, Sensitivity]) -> dict[str, Matrix]:
        """Factorize every matrix's Hessian and derive its relative steps."""
        couplings = {name: one.coupling for name, one in sensitivity.items() if one.coupling is not None}
        # A trellis along diagonals visits columns in their own order, so that the decoder knows its neighbours.
        act_order = not (self.settings.trellis_states and self.settings.lane_rows == DIAGONALS)
        inputs = FactorCache(lambda name: sensitivity[name].moments)
        outputs = FactorCache(couplings.__getitem__)
        inputs.fill(names, SMALLEST_DAMP, act_order)
        outputs.fill(couplings, SMALLEST_DAMP, act_order=False)
        matrices = {}
        for name in names:
            factor = inputs.get(name, SMALLEST_DAMP, act_order)
            row_factor = outputs.get(name, SMALLEST_DAMP, act_order=False) if name in couplings else None
            rows = sensitivity[name].rows if row_factor is None else row_factor.lengths.double().square()
            steps = relative_steps(rows, factor.column_lengths, self.settings.columns)
            weight = as_matrix(self.view.tensors[name].float())
            matrices[name] = Matrix(name, self.roles[name], weight, sensitivity[name], factor, row_factor, steps)
        return matrices

    def quantize(
        self,
        constants: Mapping[str, float],  # name → c/√κ
        weights: Mapping[str, Tensor] = MappingProxyType({}),
        states: int | None = None,  # of the trellis; None: as the settings have it
        brief: bool = False,  # leave out the facts that `described` adds: they take as long as rounding
    ) -> dict[str, QuantizedTensor]:
        """Quantize the named matrices, each by its own constant; `weights` replace the view's where given."""
        states = self.settings.trellis_states if states is None else states
        factors = {name: self._factors(name, constant) for name, constant in constants.items()}
        matrices = {name: self._with_weight(name, weights) for name in constants}
        jobs = [self._job(matrix, factors[name], states) for name, matrix in matrices.items()]
        with progress_bar("quantizing", sum(job.weight.numel() for job in jobs), "weights") as advance:
            symbols = gptq_jobs(jobs, advance=advance)
        finished = {
            job.name: self._finish(matrices[job.name], rounded, factors[job.name], job.trellis, constants[job.name])
            for job, rounded in zip(jobs, symbols, strict=True)
        }
        return finished if brief else self.described(finished, weights)

    def described(
        self, quantized: Mapping[str, QuantizedTensor], weights: Mapping[str, Tensor] = MappingProxyType({})
    ) -> dict[str, QuantizedTensor]:
        """Return tensors with the entropy of their symbols and the loss that is predicted of them among their facts."""
        return {
            name: tensor if "predicted_loss" in tensor.facts else _described(tensor, self._with_weight(name, weights))
            for name, tensor in quantized.items()
        }

    def _with_weight(self, name: str, weights: Mapping[str, Tensor]) -> Matrix:
        matrix = self.matrices[name]
        return replace(matrix, weight=as_matrix(weights[name].float())) if name in weights else matrix

    def rounding_error(self, name: str, constant: float) -> float:
        """Return the rms error that rounding one matrix at c/√κ makes in its weights."""
        steps = scale_of(self._factors(name, constant), *self.matrices[name].weight.shape)
        return float(np.sqrt(np.mean(np.square(steps, dtype=np.float64)) / 12))

    def model(
        self, quantized: Mapping[str, QuantizedTensor], floats: Mapping[str, np.ndarray] = MappingProxyType({})
    ) -> QuantizedModel:
        """Return a whole model of these matrices and the floats that are kept; `floats` replace some of the view's."""
        lineage = {"checkpoint_id": self.view.id[:12], **self.stats.lineage()}
        ordered = {name: quantized[name] for name in self.matrices}
        return QuantizedModel(self.view.config, lineage, {**ordered, **self.zeros}, {**self.passthrough, **floats})

    def _factors(self, name: str, constant: float) -> tuple[ScaleFactor, ...]:
        finer, matrix = UNION_GRID if self.settings.trellis_states else 1.0, self.matrices[name]
        factors = within_symbols(matrix.weight, matrix.steps.factors(constant * finer))
        return with_zeros(matrix.weight, factors, finer) if self.settings.zeros else factors

    def _job(self, matrix: Matrix, factors: tuple[ScaleFactor, ...], states: int) -> Job:
        steps = torch.from_numpy(scale_of(factors, *matrix.weight.shape))
        trellis = Trellis(states, min(self.settings.lane_rows, max(1, len(matrix.weight)))) if states else None
        row_feedback = None if matrix.row_factor is None else matrix.row_factor.feedback
        return Job(matrix.name, matrix.weight, matrix.factor, steps, None, trellis, row_feedback=row_feedback)

    def _finish(
        self,
        matrix: Matrix,
        symbols: Tensor,
        factors: tuple[ScaleFactor, ...],
        trellis: Trellis | None,
        constant: float,
    ) -> QuantizedTensor:
        array = smallest_dtype(symbols.numpy())
        shape = tuple(self.view.tensors[matrix.name].shape)
        tensor = QuantizedTensor(matrix.name, array, factors, shape, trellis)
        if self.settings.shrink:
            tensor = _towards_centroid(tensor, matrix)
        # No target is further from its point than a step, which costs N·c²/2; rounded exponents at most double that.
        bound = matrix.num_weights * constant**2
        if matrix.loss_of_zeros <= bound and matrix.loss_of_zeros <= _loss(tensor, matrix):
            reason = "zeros cost less than rounding to the steps of this budget"
            return as_zeros(matrix.name, matrix.role, self.view.tensors[matrix.name], matrix.loss_of_zeros, reason)
        facts = {
            "method": "fit",
            "role": matrix.role,
            "weights": matrix.num_weights,
            "constant": constant,
            "damp_used": matrix.factor.damp,
        }
        return replace(tensor, facts=facts)


def _loss(tensor: QuantizedTensor, matrix: Matrix) -> float:
    """Return the predicted loss of a matrix as it decodes."""
    return matrix.sensitivity.loss(torch.from_numpy(tensor.dequantize()).view_as(matrix.weight) - matrix.weight)


def _described(tensor: QuantizedTensor, matrix: Matrix) -> QuantizedTensor:
    facts = {"entropy_bits": entropy_bits(tensor.symbols), "predicted_loss": _loss(tensor, matrix)}
    return replace(tensor, facts={**tensor.facts, **facts})


def within_symbols(weight: Tensor, factors: tuple[ScaleFactor, ...]) -> tuple[ScaleFactor, ...]:  # (out, in)
    """Return factors whose rows are coarser where an outlier would need a symbol beyond 16 bits."""
    reach = np.abs(weight.numpy() / scale_of(factors, *weight.shape)).max(axis=1, initial=0) / MOST_SYMBOL
    if not (reach > 1).any():
        return factors
    eighths = np.ceil(8 * np.log2(np.maximum(reach, 1))).astype(np.int16)
    return tuple(
        replace(factor, values=factor.values.astype(np.int16) + eighths) if factor.axis == "row" else factor
        for factor in factors
    )


def with_zeros(weight: Tensor, factors: tuple[ScaleFactor, ...], finer: float) -> tuple[ScaleFactor, ...]:
    """Return factors that turn columns, and rows of a scalar grid, into zeros where steps exceed √12·σ.

    There Δ²/12 exceeds σ²: a Gaussian is worth no bits at all (reverse water-filling). A trellis has no zero in every
    state, so its rows stay; a column of zeros is a path of it.
    """
    energy = np.square(weight.numpy() / scale_of(factors, *weight.shape) * finer)  # in steps of the scalar grid
    quiet = {"column": energy.mean(axis=0) < ZERO_ENERGY, "row": (energy.mean(axis=1) < ZERO_ENERGY) & (finer == 1)}
    return tuple(
        replace(factor, values=_zeroed(factor.values, quiet[factor.axis])) if factor.axis in quiet else factor
        for factor in factors
    )


def _zeroed(exponents: np.ndarray, quiet: np.ndarray) -> np.ndarray:  # integers, bool → the same integers
    return np.where(quiet, np.maximum(exponents, ZEROING), exponents).astype(exponents.dtype)


def _towards_centroid(quantized: QuantizedTensor, matrix: Matrix) -> QuantizedTensor:
    """Multiply the tensor factor by the α that minimises the loss of W - α·Ŵ: uniform grids decode too far out."""
    restored = torch.from_numpy(quantized.dequantize()).view_as(matrix.weight).double()
    gradient = matrix.sensitivity.pull(restored)
    energy = float((gradient * restored).sum())
    alpha = float((gradient * matrix.weight).sum()) / energy if energy > 0 else 1.0
    tensor, *others = quantized.factors
    scaled = (alpha * tensor.values.astype(np.float32)).astype(np.float16)
    return replace(quantized, factors=(ScaleFactor("tensor", scaled), *others))


def constants_of(names: Iterable[str], constant: float, kappa: Mapping[str, float]) -> dict[str, float]:
    """Return c/√κ of each matrix."""
    return {name: constant / kappa.get(name, 1.0) ** 0.5 for name in names}
