"""Low-rank adapters on the one forward: one per document, side by side, and one per visit of a looped layer.

LoRA (Hu et al. 2021) adds B·A·x, scaled, to a matrix's product. Here every row of a batch has an A and a B of its own,
so that many documents adapt in one forward without knowing of each other, and a layer that is visited three times has
three adapters. They hang on forward hooks: the model's own code runs, whatever it does, and with B = 0 its output is
bit for bit what it was. On q, k, v an adapter runs beside its weight; `o` reads the attention's input and adds to its
output; `mlp` reads the MLP's input and adds to its output; `head` adds logits before the soft-cap (openai/
parameter-golf, PR #1855).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pgolf_post.errors import SettingsError, VerificationError
from pgolf_post.families import ModelFamily
from pgolf_post.score.ttt.gradients import synthetic_tokens
from pgolf_post.score.ttt.settings import TTTProtocol

AdapterTarget = Literal["q", "k", "v", "o", "mlp", "head"]

HEAD = "head_out"  # the module through which a family passes its head's product, before the soft-cap
ROLES = {"q": "q", "k": "k", "v": "v", "attn_proj": "o", "mlp_proj": "mlp"}  # role of a matrix → what adapts there


class AdapterProtocol(TTTProtocol):
    """Settings shared by the methods that train adapters."""

    rank: int = Field(80, ge=1, description="inner width of an adapter")
    alpha: float = Field(144.0, gt=0, description="an adapter's output is scaled by alpha / rank")
    adapt: tuple[AdapterTarget, ...] = Field(
        ("q", "k", "v", "o", "mlp", "head"), min_length=1, description="kinds of module that have an adapter"
    )
    batch_documents: int = Field(64, ge=1, description="documents of similar length that adapt side by side")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16 = forward passes under autocast: faster products, another number, another score"
    )

    @property
    def autocast(self) -> torch.dtype | None:
        """Dtype of forward passes' products; None = the weights' own."""
        return torch.bfloat16 if self.precision == "bf16" else None


def adapted_modules(module: nn.Module, family: ModelFamily, settings: AdapterProtocol) -> list[str]:
    """Return dotted paths of the modules whose output an adapter adds to.

    Raises SettingsError if a wanted kind of module does not exist.
    """
    paths_of: dict[str, list[str]] = {kind: [] for kind in settings.adapt}
    for name, _ in module.named_parameters():
        kind = ROLES.get(family.role(name), "")
        if kind in paths_of:
            owner = name.rpartition(".")[0]
            paths_of[kind].append(owner if kind in "qkv" else owner.rpartition(".")[0])
    if "head" in paths_of and HEAD in dict(module.named_modules()):
        paths_of["head"].append(HEAD)
    missing = [kind for kind, paths in paths_of.items() if not paths]
    if missing:
        possible = [kind for kind in paths_of if kind not in missing]
        raise SettingsError(
            f"this model has nowhere to put adapters on {', '.join(missing)}",
            hint=f"leave them out: --set 'adapt={json.dumps(possible)}'",
        )
    return [path for paths in paths_of.values() for path in paths]


class Adapters:
    """A language model with adapters: `hidden`, `logits` and `parameters` as the model's own."""

    def __init__(self, module: Any, family: ModelFamily, settings: AdapterProtocol) -> None:
        self.module, self.settings = module, settings
        self.scale = settings.alpha / settings.rank
        self.paths = adapted_modules(module, family, settings)
        self.a: dict[str, Tensor] = {}  # "path@visit" → (documents, rank, in)
        self.b: dict[str, Tensor] = {}  # "path@visit" → (documents, out, rank)
        self.rows = slice(0, 0)  # documents in the forward that runs
        self._visits: dict[str, int] = {}
        self._head_input: Tensor | None = None
        self.shapes = self._shapes()  # widths in and out of every visit that a forward makes
        self.begin(self.drawn(), settings.batch_documents)
        if hasattr(module, "log_probs"):
            self.log_probs = self._log_probs

    def drawn(self) -> dict[str, Tensor]:
        """Return A as it is before anything is learned, the same each time: U(±1/√in)."""
        settings, device = self.settings, next(self.module.parameters()).device
        random = torch.Generator().manual_seed(settings.seed)
        drawn = {}
        for key, (width_in, _) in self.shapes.items():
            a = torch.rand(settings.batch_documents, settings.rank, width_in, generator=random)
            drawn[key] = ((2 * a - 1) / math.sqrt(width_in)).to(device)
        return drawn

    def _shapes(self) -> dict[str, tuple[int, int]]:
        """Return widths in and out of every visit, seen on a forward over made-up tokens."""
        shapes: dict[str, tuple[int, int]] = {}

        def look(key: str, x: Tensor, output: Tensor) -> Tensor:
            shapes[key] = x.size(-1), output.size(-1)
            return output

        tokens = synthetic_tokens(self.module, 2)
        with torch.no_grad(), self._hooked(look):
            self.logits(self.hidden(tokens).flatten(0, 1))
        return shapes

    @contextmanager
    def _hooked(self, adapt: Callable[[str, Tensor, Tensor], Tensor]) -> Iterator[None]:
        """Send every adapted module's output through `adapt(key, input, output)` inside."""
        modules = dict(self.module.named_modules())
        handles = [modules[path].register_forward_hook(self._hook(path, adapt)) for path in self.paths]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, path: str, adapt: Callable[[str, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            visit = self._visits.get(path, 0)
            self._visits[path] = visit + 1
            x = self._head_input if path == HEAD else inputs[0]
            assert x is not None
            return adapt(f"{path}@{visit}", x, output)

        return hook

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Add the adapters' outputs in every forward inside."""
        with self._hooked(self._adapt):
            yield

    def _adapt(self, key: str, x: Tensor, output: Tensor) -> Tensor:
        """Return output + scale · B A x, with each row's own A and B."""
        a, b = self.a[key][self.rows], self.b[key][self.rows]
        by_row, plain = (some.reshape(len(a), -1, some.size(-1)).to(a.dtype) for some in (x, output))
        added = torch.baddbmm(plain, torch.bmm(by_row, a.mT), b.mT, alpha=self.scale)
        return added.view_as(output).to(output.dtype)

    # ---- as a language model --------------------------------------------------------------------------------------

    def parameters(self) -> Iterator[Tensor]:
        yield from self.module.parameters()

    def hidden(self, tokens: Tensor, first: int = 0) -> Tensor:  # (rows, seq_len) → (rows, seq_len, dim)
        """Return the model's hidden states; row i uses the adapters of document `first` + i of the batch."""
        self._visits, self.rows = {}, slice(first, first + tokens.size(0))
        states: Tensor = self.module.hidden(tokens)
        return states

    def logits(self, hidden: Tensor) -> Tensor:  # (rows · k, dim), row by row → (rows · k, vocab_size)
        """Return the model's logits of equally many positions of each row."""
        self._head_input = hidden
        self._visits.pop(HEAD, None)
        logits: Tensor = self.module.logits(hidden)
        return logits

    def _log_probs(self, hidden: Tensor) -> Tensor:
        self._head_input = hidden
        self._visits.pop(HEAD, None)
        log_probs: Tensor = self.module.log_probs(hidden)
        return log_probs

    # ---- what is learned -------------------------------------------------------------------------------------------

    def trained(self) -> dict[str, Tensor]:
        """Return every matrix of every adapter, by name."""
        named = {f"{key}.a": tensor for key, tensor in self.a.items()}
        return {**named, **{f"{key}.b": tensor for key, tensor in self.b.items()}}

    def begin(self, a: dict[str, Tensor], documents: int) -> None:
        """Start a batch: B ← 0, so that the next forward is the plain model's; A is what the lane carries.

        A batch of fewer documents than `a` has rows gets copies of the first ones.
        """
        self.a = {key: tensor[:documents].clone() if documents < len(tensor) else tensor for key, tensor in a.items()}
        for key, tensor in self.a.items():
            if key in self.b and len(self.b[key]) == documents:
                self.b[key].zero_()
            else:
                self.b[key] = tensor.new_zeros(documents, self.shapes[key][1], self.settings.rank)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        device = next(self.module.parameters()).device
        self.a = {key: state[f"{key}.a"].to(device, copy=True) for key in self.shapes}
        self.b = {key: state[f"{key}.b"].to(device, copy=True) for key in self.shapes}

    @property
    def numbers(self) -> int:
        """Return how many numbers a document trains."""
        return sum(self.settings.rank * (width_in + width_out) for width_in, width_out in self.shapes.values())

    @torch.no_grad()
    def require_zero_is_plain(self) -> None:
        """Raise VerificationError unless adapters with B = 0 leave the forward bit for bit as it is."""
        tokens = synthetic_tokens(self.module)[: self.settings.batch_documents]
        plain_hidden = self.module.hidden(tokens).flatten(0, 1)
        plain = self.module.logits(plain_hidden)
        with self.attached():
            adapted = self.logits(self.hidden(tokens).flatten(0, 1))
        if not torch.equal(plain, adapted):
            worst = float((plain - adapted).abs().max())
            raise VerificationError(f"adapters that add nothing change the model's logits by {worst:g}")
