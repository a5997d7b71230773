"""What scoring costs, as ratios in one run; with a checkpoint and an artifact, what each protocol says about them.

    python -m benchmarks.bench_score      speed: sliding, adapters side by side, compiled swap
    python -m benchmarks.bench_score screening ARTIFACT_A ARTIFACT_B [--reference CHECKPOINT] --data FOLDER
    python -m benchmarks.bench_score shown CHECKPOINT ARTIFACT --data FOLDER
    python -m benchmarks.bench_score audits ARTIFACT --data FOLDER
    python -m benchmarks.bench_score order ARTIFACT ARTIFACT … --data FOLDER

Speed uses the small CPU recipe's shape (4.6M parameters) with random weights, which cost the same as trained ones; the
two sides of a ratio take turns.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.bench_hot_start import random_checkpoint
from pgolf_post.base.progress import print_table, say
from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import BOS_ID, DataFolder
from pgolf_post.data.build import BuildSettings, build
from pgolf_post.data.stdlib_corpus import stdlib_documents, stdlib_source
from pgolf_post.families import get_family, load_module
from pgolf_post.score.audit.behaviour import audit_behaviour
from pgolf_post.score.audit.causality import Audited
from pgolf_post.score.bpb import Score, documents_of
from pgolf_post.score.compare.documents import paired_documents
from pgolf_post.score.compare.expected import chance_of, target_values
from pgolf_post.score.compare.paired import t_interval
from pgolf_post.score.compare.screen import EXCLUDED, ScreenSettings, screen
from pgolf_post.score.plain import PlainProtocol
from pgolf_post.score.pool import ModelPool
from pgolf_post.score.protocols import Protocol, folder_text, protocol_spans, score_text
from pgolf_post.score.session import Session
from pgolf_post.score.sliding import SlidingProtocol, sliding_spans
from pgolf_post.score.spans import num_targets, places_of, stack
from pgolf_post.score.ttt.methods import ttt_protocol

REPEATS = 3
SEQ_LEN = 512
SLIDING_TOKENS = 512 + 64 * 32 + 1
SCREEN_SHARE, HALF_WIDTH = 0.25, 0.0005
PIECE_TOKENS, PIECE_DOCUMENTS = 512, 32  # of the excerpt that `shown` scores


def interleaved(works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median CPU seconds of each, taking turns: unlike wall time they say little about the machine's other work."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(REPEATS):
        for name, work in works.items():
            started = time.process_time()
            work()
            seconds[name].append(time.process_time() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def fastest(works: dict[str, Callable[[], object]], repeats: int = 5) -> dict[str, float]:
    """Shortest wall seconds of each, taking turns: what is left of them where the machine's other work let go."""
    seconds = dict.fromkeys(works, float("inf"))
    for _ in range(repeats):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            seconds[name] = min(seconds[name], time.perf_counter() - started)
    return seconds


def random_model(root: Path) -> tuple[Any, DataFolder, Any]:
    """A checkpoint's view, its data, and its module."""
    out = root / "data"
    data = build(stdlib_documents(), out, BuildSettings(name="bench"), source=stdlib_source())
    view = random_checkpoint(root, data).load()
    return view, data, load_module(view.config, view.tensors, "bench")


@torch.no_grad()
def straightforward_sliding(module: Any, tokens: np.ndarray, targets: int, stride: int) -> float:
    """Every position of every window to the end, logits and loss; then the scored ones are picked."""
    total = 0.0
    spans = sliding_spans(targets, SEQ_LEN, stride)
    groups: list[list[Any]] = [spans[:1], *(spans[i : i + 32] for i in range(1, len(spans), 32))]
    for group in groups:
        inputs, _ = stack(tokens, group)
        whole = np.stack([tokens[s.start + 1 : s.start + s.length + 1] for s in group]).astype(np.int64)
        wanted = torch.from_numpy(whole)
        logits = module.logits(module.hidden(inputs))
        nats = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view(wanted.shape)
        total += float(nats[:, -group[0].scored :].double().sum())
    return total


def bench_sliding(view: Any, data: DataFolder, module: Any) -> None:
    tokens = data.tokens("val", SLIDING_TOKENS)
    family = get_family(view.config["family"])
    protocol = SlidingProtocol(seq_len=SEQ_LEN, stride=64, tail="score")
    counts = data.token_bytes("val", tokens)
    theirs = straightforward_sliding(module, tokens, len(tokens) - 1, 64)
    ours = score_text(module, family, tokens, counts, protocol)[0].nats
    assert abs(theirs - ours) < 1e-5 * ours
    seconds = interleaved(
        {
            "plain way": lambda: straightforward_sliding(module, tokens, len(tokens) - 1, 64),
            "ours": lambda: score_text(module, family, tokens, counts, protocol),
        }
    )
    ratio = seconds["ours"] / seconds["plain way"]
    rows = [("every position of every window", f"{seconds['plain way']:.2f}", "1.000")]
    rows += [("logits only where scored", f"{seconds['ours']:.2f}", f"{ratio:.3f}")]
    title = f"Sliding window, stride 64 of {SEQ_LEN}, {len(tokens) - 1:,} targets"
    print_table(title, ("", "CPU seconds", "ratio"), rows)


def bench_swap(view: Any, data: DataFolder, root: Path) -> None:
    """A second set of weights on a compiled model."""
    tokens = data.tokens("val", 4 * SEQ_LEN + 1)
    counts, family = data.token_bytes("val", tokens), get_family(view.config["family"])
    protocol, pool = PlainProtocol(seq_len=SEQ_LEN), ModelPool(compiled=True)
    rows = []
    for number in (1, 2):
        session = Session()
        started = time.perf_counter()
        tensors = {name: tensor * (1 + 0.001 * number) for name, tensor in view.tensors.items()}
        model = pool.load(view.config, tensors, "bench", torch.device("cpu"))
        pool.warm_up(model, protocol, len(tokens), session.clock)
        score_text(model, family, tokens, counts, protocol, session)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        compiling = session.clock.seconds.get("compile", 0.0)
        rows.append((f"artifact {number}", f"{time.perf_counter() - started:.1f}", f"{compiling:.1f}", str(graphs)))
    print_table("Compiled model, weights swapped in place", ("", "seconds", "compiling", "graphs so far"), rows)


def bench_lora(view: Any, data: DataFolder, module: Any) -> None:
    """Documents side by side against one at a time, tokens per second."""
    split = data.tokens("val", 200_000)
    starts = np.flatnonzero(split == BOS_ID)
    long_enough = [a for a, b in zip(starts, [*starts[1:], len(split)], strict=True) if b - a >= 160][:8]
    tokens = np.concatenate([split[a : a + 160] for a in long_enough])
    counts, family = np.ones(len(tokens), dtype=np.int64), get_family(view.config["family"])

    def run(documents: int) -> Callable[[], object]:
        overrides = [f"batch_documents={documents}", "rank=16", "alpha=28.8", "tail=score"]
        protocol = ttt_protocol("lora", overrides, {}, SEQ_LEN)
        return lambda: score_text(module, family, tokens, counts, protocol)

    rows = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        seconds = fastest({"one": run(1), "many": run(len(long_enough))})
        for name, value in (("one at a time", seconds["one"]), ("8 side by side", seconds["many"])):
            rate, ratio = f"{len(tokens) / value:.0f}", f"{seconds['one'] / value:.2f}"
            rows.append((str(threads), name, rate, ratio))
    torch.set_num_threads(1)
    title = f"LoRA-TTT, rank 16, chunks of 48, {len(long_enough)} documents of 160 tokens"
    print_table(title, ("threads", "", "tokens per second", "ratio"), rows)


def artifact_module(path: Path) -> tuple[Any, dict[str, Any]]:
    from pgolf_post.pack.artifact import find_artifact, read_artifact

    decoded = read_artifact(find_artifact(path))
    config = decoded.manifest["config"]
    tensors = {name: torch.from_numpy(array) for name, array in decoded.tensors.items()}
    return load_module(config, tensors, str(path)), config


def bench_screening(first: Path, second: Path, reference: Path | None, data: DataFolder) -> None:
    """How much text it takes to know the difference of two artifacts to ±0.0005, and how often what is said is true."""
    (candidate, config), (control, _) = artifact_module(first), artifact_module(second)
    seq_len = get_family(config["family"]).train_seq_len(candidate)
    tokens, counts = folder_text(data, PlainProtocol(seq_len=seq_len))
    spans = protocol_spans(PlainProtocol(seq_len=seq_len), num_targets(len(tokens), seq_len, "drop"))
    some = np.sort(np.random.default_rng(0).permutation(len(spans))[: int(SCREEN_SHARE * len(spans))])
    places = places_of([spans[i] for i in some]).reshape(len(some), seq_len)
    expecting = checkpoint_module(reference) if reference else candidate
    values = np.zeros((5, *places.shape))
    for row, window in enumerate(some):
        values[:, row] = target_values(expecting, [candidate, control], tokens, [spans[window]]) / np.log(2)
        if row % 128 == 0:
            say(f"{row} of {len(some)} windows")
    kinds = {"measured": values[1] - values[2]}
    if reference:
        kinds["expected by the reference"] = values[3] - values[4]
        surprises = (kinds["measured"] - kinds["expected by the reference"]).sum(1)
        surprise = chance_of(surprises, int(counts[places].sum()), 0.95)
        print(f"measured less expected {surprise.bpb:+.5f} bpb; by chance up to {surprise.half:.5f}")
    for kind, bits in kinds.items():
        needed(kind, bits, counts[places], documents_of(tokens)[places[:, seq_len // 2]], len(spans))
        resample(kind, bits.sum(1), counts[places].sum(1), len(spans))


def checkpoint_module(path: Path) -> Any:
    view = Checkpoint.open(path).load()
    return load_module(view.config, view.tensors, str(view))


def needed(kind: str, bits: np.ndarray, counts: np.ndarray, document: np.ndarray, total: int) -> None:
    """From differences by token (windows, seq_len): the text that one look needs, by what is taken as independent."""
    size, number = counts.sum(1), len(bits)
    ratio = bits.sum() / counts.sum()
    _, group = np.unique(document, return_inverse=True)
    means = np.bincount(group, bits.sum(1)) / np.bincount(group)
    line = np.polyfit(size, bits.sum(1), 1)
    spreads = {
        "tokens, as if they were independent: no sample does better": (bits - bits.mean()).std() * bits.shape[1] ** 0.5,
        "windows within documents": np.sqrt(((bits.sum(1) - means[group]) ** 2).sum() / (number - len(means))),
        "windows, regressed on their bytes": (bits.sum(1) - np.polyval(line, size)).std(ddof=2),
        "windows, sum of bits over sum of bytes": (bits.sum(1) - ratio * size).std(ddof=1),
    }
    rows = []
    for name, spread in spreads.items():
        bpb = spread / size.mean()
        alone = (1.96 * bpb / HALF_WIDTH) ** 2
        half = 1.96 * bpb * np.sqrt((1 - 0.12) / (0.12 * total))
        rows.append((name, f"{spread:.2f}", f"{100 / (1 + total / alone):.1f} %", f"±{half:.5f}"))
    heads = (f"Δ {ratio:+.5f} bpb", "sd, bits a window", f"text for ±{HALF_WIDTH}", "at 12 % of the text")
    print_table(f"One look at the difference {kind}, 95 %", heads, rows)


def resample(kind: str, bits: np.ndarray, size: np.ndarray, total: int, texts: int = 300) -> None:
    """Draw whole texts from the windows that were scored, (windows,) each; screen them; count the truths covered."""
    random = np.random.default_rng(1)
    rows = []
    for stop_at_zero in (False, True):
        covered, used, reasons = 0, [], []
        for text in range(texts):
            drawn = random.integers(0, len(bits), total)

            def scores(chosen: np.ndarray, drawn: np.ndarray = drawn) -> tuple[Score, Score]:
                nats = np.log(2) * bits[drawn[chosen]]
                rest = np.full(len(chosen), SEQ_LEN), size[drawn[chosen]]
                first, second = (Score(chosen, chosen, chosen, x, *rest, 0.0) for x in (nats, 0 * nats))
                return first, second

            settings = ScreenSettings(half_width_bpb=HALF_WIDTH, seed=text, stop_at_zero=stop_at_zero)
            found = screen(scores, size[drawn], total * SEQ_LEN, settings, quiet=True)
            covered += found.low <= bits[drawn].sum() / size[drawn].sum() <= found.high
            used.append(found.last.windows / total)
            reasons.append(found.reason == EXCLUDED)
        name = "at zero, or known well enough" if stop_at_zero else "known well enough"
        share = f"{100 * np.median(used):.1f} %"
        rows.append((name, f"{covered / texts:.3f}", share, f"{np.mean(reasons):.2f}"))
    heads = ("stop", "covers the truth", "median text used", "excluded zero")
    print_table(f"{texts} resampled texts, ±{HALF_WIDTH}, {kind}", heads, rows)


def excerpt(data: DataFolder, length: int, documents: int) -> tuple[np.ndarray, np.ndarray]:
    """The beginnings of the first documents that are long enough, each with its BOS."""
    tokens, counts = folder_text(data, PlainProtocol(seq_len=SEQ_LEN))
    starts = np.flatnonzero(tokens == BOS_ID)
    long_enough = [a for a, b in zip(starts, [*starts[1:], len(tokens)], strict=True) if b - a >= length]
    places = np.concatenate([np.arange(a, a + length) for a in long_enough[:documents]])
    return tokens[places], counts[places]


def shown_protocols() -> dict[str, Protocol]:
    """What the table shows; learning rates and phases for an excerpt of this size and a model of this width."""
    chunk = ["chunk_tokens=2048", "tail=score"]
    lora = ["chunk_tokens=64", "rank=16", "alpha=28.8", "learning_rate=0.001", "tail=score"]
    lora += ["batch_documents=8"]
    phases = ["phases=[8,16,24]", "global_seq_len=512", "global_chunk_tokens=2048"]
    return {
        "plain": PlainProtocol(seq_len=SEQ_LEN, tail="score"),
        "sliding": SlidingProtocol(seq_len=SEQ_LEN, stride=64, tail="score"),
        "ttt sgd": ttt_protocol("sgd", chunk, {}, SEQ_LEN),
        "ttt scales": ttt_protocol("scales", chunk, {}, SEQ_LEN),
        "ttt lora": ttt_protocol("lora", lora, {}, SEQ_LEN),
        "ttt phased": ttt_protocol("phased", [*lora, *phases], {}, SEQ_LEN),
    }


def shown(checkpoint: Path, artifact: Path, data: DataFolder) -> None:
    """bpb, seconds and interval of every protocol, against the quantized model's plain score."""
    from pgolf_post.checkpoint import Checkpoint

    tokens, counts = excerpt(data, PIECE_TOKENS, PIECE_DOCUMENTS)
    view = Checkpoint.open(checkpoint).load()
    family = get_family(view.config["family"])
    module, _ = artifact_module(artifact)
    subjects = [("not quantized, plain", load_module(view.config, view.tensors, "shown"), shown_protocols()["plain"])]
    subjects += [(f"quantized, {name}", module, protocol) for name, protocol in shown_protocols().items()]
    scores, rows = {}, []
    for name, model, protocol in subjects:
        started = time.perf_counter()
        scores[name] = score_text(model, family, tokens, counts, protocol, Session(description=name))[0]
        seconds = time.perf_counter() - started
        rows.append([name, f"{scores[name].bpb:.5f}", f"{seconds:.0f}"])
        say(f"{name}: {scores[name].bpb:.5f} bpb, {seconds:.0f} s")
    for row in rows:
        if row[0] != "quantized, plain":
            d = t_interval(paired_documents(scores[row[0]], scores["quantized, plain"]))
            row += [f"{d.bpb:+.5f}", f"{d.low:+.5f} … {d.high:+.5f}"]
        else:
            row += ["", ""]
    title = f"{len(tokens):,} tokens: the first {PIECE_TOKENS} of {PIECE_DOCUMENTS} documents"
    print_table(title, ("", "bpb", "seconds", "against plain", "95 %, by document"), rows)


def order(artifacts: Sequence[Path], data: DataFolder) -> None:
    """Whether artifacts that differ before test-time training differ alike after it: plain and lora of each."""
    tokens, counts = excerpt(data, PIECE_TOKENS, PIECE_DOCUMENTS)
    protocols = {name: shown_protocols()[name] for name in ("plain", "ttt lora")}
    rows: list[list[str]] = []
    first: dict[str, Any] = {}
    for path in artifacts:
        module, config = artifact_module(path)
        row = [path.parent.name, f"{path.stat().st_size:,}"]
        for name, protocol in protocols.items():
            session = Session(description=f"{path.parent.name}, {name}")
            score = score_text(module, get_family(config["family"]), tokens, counts, protocol, session)[0]
            d = t_interval(paired_documents(score, first.setdefault(name, score)))
            row += [f"{score.bpb:.5f}", f"{d.bpb:+.5f}", f"{d.low:+.5f} … {d.high:+.5f}"]
        rows.append(row)
    header = ("artifact", "bytes", *(text for name in protocols for text in (name, "against the first", "95 %")))
    print_table(f"{len(tokens):,} tokens, {PIECE_DOCUMENTS} documents", header, rows)


def audits(artifact: Path, data: DataFolder) -> None:
    """Every protocol's audit of one model on the beginnings of eight documents."""
    module, config = artifact_module(artifact)
    family = get_family(config["family"])
    tokens, _ = excerpt(data, 64, 8)
    lora = ["chunk_tokens=16", "rank=16", "alpha=28.8", "learning_rate=0.001", "batch_documents=2", "tail=score"]
    phases = ["phases=[2,4,6]", "global_seq_len=64", "global_chunk_tokens=64"]
    protocols: dict[str, Protocol] = {
        "plain": PlainProtocol(seq_len=128, tail="score"),
        "sliding": SlidingProtocol(seq_len=128, stride=64, tail="score"),
        "ttt sgd": ttt_protocol("sgd", ["chunk_tokens=128", "tail=score"], {}, 128),
        "ttt scales": ttt_protocol("scales", ["chunk_tokens=128", "tail=score"], {}, 128),
        "ttt lora": ttt_protocol("lora", lora, {}, 128),
        "ttt phased": ttt_protocol("phased", [*lora, *phases], {}, 128),
    }
    rows = []
    for name, protocol in protocols.items():
        audited = Audited.of(module, family, bool(config["model"].get("isolate_documents")), protocol)
        for finding in audit_behaviour(audited, tokens, samples=2):
            outcome = {True: "pass", False: "FAIL", None: "n/a"}[finding.passed]
            rows.append((name, finding.test, outcome, finding.evidence))
            say(f"{name}: {finding.test}: {outcome}: {finding.evidence}")
    print_table(f"{len(tokens) - 1} targets", ("protocol", "test", "", "evidence"), rows)


def main(arguments: tuple[str, ...] = ()) -> None:
    if arguments:
        kind, first, second, *_, folder = arguments
        data = DataFolder.open(Path(folder))
        if kind == "order":
            order([Path(argument) for argument in arguments[1:-2]], data)
            return
        if kind == "audits":
            audits(Path(first), data)
            return
        if kind == "screening":
            at = arguments.index("--reference") if "--reference" in arguments else None
            bench_screening(Path(first), Path(second), Path(arguments[at + 1]) if at else None, data)
            return
        shown(Path(first), Path(second), data)
        return
    with tempfile.TemporaryDirectory() as folder:
        view, data, module = random_model(Path(folder))
        bench_sliding(view, data, module)
        bench_lora(view, data, module)
        bench_swap(view, data, Path(folder))


if __name__ == "__main__":
    main(tuple(sys.argv[1:]))
