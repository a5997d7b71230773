"""The program of a record folder that scores: decode the artifact, score the text, print the sums.

    python train_gpt.py DATA [TOKENS]       DATA holds fineweb_val_*.bin and a tokenizer .model; only the first TOKENS
    torchrun --standalone --nproc_per_node=8 train_gpt.py DATA

This is ordinary code of ours that never runs here: the amalgamator makes the eval form of `train_gpt.py` from it, with
model, protocol and artifact known. So a record folder scores by the very functions that scored here.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pgolf_post.base.ranks import Ranks
from pgolf_post.data.shards import HEADER_BYTES
from pgolf_post.data.tokenizer import ByteTable
from pgolf_post.families import on_no_device
from pgolf_post.pack import decode
from pgolf_post.score.bpb import sum_units
from pgolf_post.score.phase_times import PhaseTimes
from pgolf_post.score.protocols import Protocol, make_pass, unit_windows

ARTIFACT = "artifact.pgolf"


def known_protocol() -> Protocol:
    """Return the protocol; replaced when the program is made, which knows it."""
    raise NotImplementedError


def known_model() -> Any:
    """Return the model on no device, without weights; replaced when the program is made."""
    raise NotImplementedError


def main() -> None:
    """Score and print {bpb, nats, tokens, bytes, seconds}."""
    run(joined())


def run(ranks: Ranks) -> None:
    """Score the artifact beside this file on these ranks, then leave their group."""
    clock = PhaseTimes()
    given = sys.argv[2] if sys.argv[2:] else "all"
    limit = known_protocol().max_tokens if given == "all" else int(given)
    with clock.phase("load"):
        tokens, token_bytes = read_text(Path(sys.argv[1] if sys.argv[1:] else "data"), limit)
    with clock.phase("decompress"):
        tensors = decode.decode((Path(__file__).parent / ARTIFACT).read_bytes())[1]
    with clock.phase("load"):
        module = built(tensors, ranks.device)
    session: Any = SimpleNamespace(clock=clock, ranks=ranks)
    score(module, tokens, token_bytes, session, known_protocol())
    if ranks.world_size > 1:
        dist.destroy_process_group()


def score(module: Any, tokens: np.ndarray, token_bytes: np.ndarray, session: Any, protocol: Protocol) -> None:
    """Run the protocol's steps and print the sums."""
    work = make_pass(module, family(), tokens, protocol, session)
    for step in range(len(work.costs)):
        work.step(step)
    work.log.merge(session.ranks)
    work.log.require_complete()
    targets = np.flatnonzero(work.log.scored)
    windows = unit_windows(tokens, protocol, targets)
    sums = sum_units(tokens, targets, windows, work.log.nats[targets], token_bytes, 0.0)
    if session.ranks.is_main:
        print(json.dumps({**sums.sums(), **session.clock.seconds}))


def family() -> Any:
    """Return what of the model's family the program needs: nothing; replaced where it does (`forms`)."""
    return None


def joined() -> Ranks:
    """Return this process's place, from torchrun's variables."""
    place = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    ranks = Ranks(*(int(os.environ.get(name, default)) for name, default in place))
    if ranks.world_size > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(ranks.local_rank)
        dist.init_process_group()
    return ranks


def read_text(
    folder: Path, limit: int | None
) -> tuple[np.ndarray, np.ndarray]:  # tokens (n,) uint16, token_bytes (n,) int64
    """Return the first `limit` tokens of a folder's validation split, and the bytes of text each stands for."""
    import sentencepiece

    sidecars = sorted(folder.glob("**/fineweb_val_bytes_*.bin"))
    shards = [path for path in sorted(folder.glob("**/fineweb_val_*.bin")) if path not in sidecars]
    tokens = read_shards(shards)[:limit]
    if sidecars:
        return tokens, read_shards(sidecars)[: len(tokens)].astype(np.int64)
    (model,) = folder.glob("**/*.model")
    table = ByteTable.from_tokenizer(sentencepiece.SentencePieceProcessor(model_file=str(model)))
    return tokens, table.count(np.concatenate([tokens[:1], tokens[:-1]]), tokens)


def read_shards(paths: list[Path]) -> np.ndarray:  # (n,) uint16
    """Return the tokens of shards in order."""
    return np.concatenate([np.fromfile(path, "<u2", offset=HEADER_BYTES) for path in paths])


def built(tensors: Any, device: torch.device) -> Any:
    """Return the model in float32 with its weights."""
    with on_no_device():
        module = known_model()
    state = {name: torch.as_tensor(array) for name, array in tensors.items()}
    module.load_state_dict(state, assign=True)
    return module.to(device).eval().requires_grad_(False)
