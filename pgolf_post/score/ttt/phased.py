"""Tuning the weights themselves, a few times, on the documents that are fully scored by then.

Adapters forget between documents; what documents have in common is left to one epoch of SGD over all that have been
scored, whenever their number passes the next phase's boundary. Sequences stay within a document; the last chunk of the
epoch is skipped. Source: openai/parameter-golf, PR #1855.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pgolf_post.base.progress import say
from pgolf_post.base.ranks import Ranks
from pgolf_post.score.commits import CommitLog
from pgolf_post.score.ttt.optimizers import cosine, optimizer_step
from pgolf_post.score.ttt.settings import TTTProtocol
from pgolf_post.score.ttt.sgd import Sequence, backward, cut_sequences

if TYPE_CHECKING:
    from pgolf_post.score.ttt.lora import Text


def phases_reached(documents: int, settings: TTTProtocol) -> int:
    """How many phases' boundaries a number of fully scored documents has reached."""
    return sum(boundary <= documents for boundary in settings.phases)


def tuned_after(batches: list[list[Text]], settings: TTTProtocol) -> list[int]:
    """Numbers of the batches after which a phase is run."""
    if settings.method != "phased":
        return []
    reached = [0, *(phases_reached(int(n), settings) for n in np.cumsum([len(batch) for batch in batches]))]
    return [number for number in range(len(batches)) if reached[number + 1] > reached[number]]


class GlobalTuning:
    """The weights' own learning, at phase boundaries, which ranks reach together."""

    def __init__(self, module: Any, ledger: CommitLog, settings: TTTProtocol, ranks: Ranks) -> None:
        self.module, self.ledger, self.settings, self.ranks = module, ledger, settings, ranks
        self.parameters: dict[str, Tensor] = dict(module.named_parameters())
        self.phases_run = 0
        self.steps = 0

    def run(self, scored: list[Text]) -> None:
        """The phase that these fully scored documents have reached; one if they passed several boundaries."""
        self.ledger.merge(self.ranks)
        self.phases_run = phases_reached(len(scored), self.settings)
        self.tune(scored)
        phases = len(self.settings.phases)
        say(f"phase {self.phases_run} of {phases}: weights tuned on {len(scored)} scored documents")

    def tune(self, scored: list[Text]) -> None:
        """One epoch over documents, in the text's order."""
        chunks = self.chunks(sorted(scored, key=lambda text: text.start))
        momentum = self.settings.global_momentum
        sgd = torch.optim.SGD(list(self.parameters.values()), lr=self.settings.global_lr, momentum=momentum)
        for number, sequences in enumerate(chunks[:-1]):
            backward(self.module, self.parameters, sequences, self.ranks)
            rate = self.settings.global_lr * cosine(number, len(chunks))
            optimizer_step({"sgd": sgd}, self.parameters, rate, self.settings.global_grad_clip)
            self.steps += 1

    def chunks(self, texts: list[Text]) -> list[list[Sequence]]:
        """Sequences of scored tokens, gathered until a chunk is full."""
        found: list[list[Sequence]] = [[]]
        held = 0
        for text in texts:
            own = self.ledger.hand_out(text.start + 1, text.stop + 1)
            tokens = torch.cat([torch.tensor([int(self.ledger.tokens[text.start])]), torch.from_numpy(own)]).numpy()
            for sequence in cut_sequences(tokens, self.settings.global_seq_len):
                if held and held + len(sequence[1]) > self.settings.global_chunk_tokens:
                    found.append([])
                    held = 0
                found[-1].append(sequence)
                held += len(sequence[1])
        return found

    def state(self) -> dict[str, Tensor]:
        counts = {"phases_run": torch.tensor(self.phases_run), "steps": torch.tensor(self.steps)}
        return {**{f"weight.{name}": parameter for name, parameter in self.parameters.items()}, **counts}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state[f"weight.{name}"])
        self.phases_run, self.steps = int(state["phases_run"]), int(state["steps"])
