"""Documents of a text, in batches of similar length, dealt to queues that run side by side.

Documents are sorted by length, longest first, so that those of a batch advance together. A lane is one of a fixed
number of queues of batches; ranks share the lanes, so what is carried along a lane does not depend on their number.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pgolf_post.data.tokenizer import BOS_ID
from pgolf_post.errors import MismatchError


@dataclass(frozen=True)
class Document:
    """A document's place in the text: inputs [start, stop), targets [start + 1, stop]."""

    start: int
    stop: int

    @property
    def targets(self) -> int:
        return self.stop - self.start


def find_documents(tokens: np.ndarray, num_targets: int) -> list[Document]:  # tokens: (n,)
    """Return the documents of a text up to its last target. Raises MismatchError if it has no BOS."""
    starts = np.flatnonzero(tokens[:num_targets] == BOS_ID).tolist()
    if not starts:
        raise MismatchError(
            f"no BOS (token id {BOS_ID}) in {num_targets:,} tokens: where documents begin is unknown",
            hint="adapt without documents: --ttt sgd",
        )
    bounds = sorted({0, *starts, num_targets})
    return [Document(a, b) for a, b in pairwise(bounds)]


def batch_by_length(documents: list[Document], size: int) -> list[list[Document]]:
    """Return batches of `size` documents, longest first; ties in the text's order."""
    ordered = sorted(documents, key=lambda document: (-document.targets, document.start))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def deal(costs: list[float], lanes: int, together: list[int]) -> list[int]:  # one lane per batch
    """Return the lane of each batch: the first with the least to do.

    All lanes wait for each other after the batches in `together`.
    """
    load, dealt = [0.0] * lanes, []
    for number, cost in enumerate(costs):
        lane = load.index(min(load))
        dealt.append(lane)
        load[lane] += cost
        if number in together:
            load = [max(load)] * lanes
    return dealt
