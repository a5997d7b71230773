"""Fine-tuning on several ranks: rank 0 fits, and the others help wherever it tunes.

Rounding, packing and searching run on rank 0 alone. Before each call of `tune` it says what is to be tuned, and adds
its weights to the zeros of the others, so that all replicas start alike. Each rank then reads its share of a batch's
windows, gradients are added up, and all take the same step. The order of additions is all that the number of
ranks decides. The helpers wait in between, and leave when they are told that nothing more will be tuned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from pgolf_post.base.ranks import Ranks
from pgolf_post.calibrate.text import CalibrationSet
from pgolf_post.checkpoint import View
from pgolf_post.fit.precondition import Roots
from pgolf_post.fit.tune import TunedModel
from pgolf_post.settings import Precision


@dataclass(frozen=True)
class Call:
    """One call of `tune`, as the helpers need to know it."""

    tokens_between: int
    taken: int  # batches before it
    rates: Mapping[str, float]
    label: str
    preconditioned: bool = False
    floats: Sequence[str] = ()


class SharedTuning(TunedModel):
    """A model that is tuned by all ranks. Its methods run on rank 0; `help_tune` runs on the others."""

    def __init__(
        self,
        view: View,
        text: CalibrationSet,
        tokens_between: int,
        precision: Precision,
        ranks: Ranks,
        roots: Mapping[str, Roots] | None = None,
    ) -> None:
        super().__init__(view, text, tokens_between, precision, ranks, roots)
        self.tokens_between = tokens_between

    def tune(self, rates: Mapping[str, float], label: str, floats: Sequence[str] = ()) -> None:
        """Tune as TunedModel does, with the help of all other ranks."""
        _tell(self.ranks, Call(self.tokens_between, self.taken, rates, label, self.roots is not None, floats))
        self.share_weights()
        self.share_roots(rates)
        super().tune(rates, label, floats)


def help_tune(view: View, text: CalibrationSet, precision: Precision, ranks: Ranks) -> None:
    """Take part in every call of `tune` on rank 0 until `end_help`. Raises what rank 0 raises."""
    while (call := _told(ranks)) is not None:
        tuned = TunedModel(view, text, call.tokens_between, precision, ranks, {} if call.preconditioned else None)
        tuned.pass_over(call.taken)
        tuned.share_weights()
        tuned.share_roots(call.rates)
        tuned.tune(call.rates, call.label, call.floats)


def end_help(ranks: Ranks) -> None:
    """Let the helpers go."""
    _tell(ranks, None)


def _tell(ranks: Ranks, call: Call | None) -> None:
    """Say what is next, once all have come: rank 0 may have worked for long, longer than a transfer may take."""
    ranks.wait()
    ranks.main_says(None if call is None else asdict(call))


def _told(ranks: Ranks) -> Call | None:
    ranks.wait()
    facts = ranks.main_says(None)
    return None if facts is None else Call(**facts)
