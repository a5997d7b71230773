"""The steps of `tests.gpu.session`, each run as `python -m tests.gpu.steps NAME --out FOLDER [--dry]`.

A step prints its facts as JSON lines, and fails by an exception. With --dry it does the same things small, on the CPU,
and leaves out what a CPU does not have.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import platform
import resource
import runpy
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_train import (
    H100_FLOPS,
    PUBLISHED,
    RECORD_STEPS,
    RECORD_TOKENS,
    build_data,
    flops_per_token,
    trainer_for,
)
from pgolf_post.base.copying import page_locked, to_device
from pgolf_post.base.progress import say
from pgolf_post.base.ranks import ALONE
from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from trainer.model.attention_backends import BACKENDS, Reach
from trainer.optim.muon import COEFFICIENTS, orthogonalize
from trainer.run.warm_up import warm_up

REPOSITORY = Path(__file__).parents[2]
FORWARD_LIMIT, BACKWARD_LIMIT = 0.02, 0.04  # relative errors of bfloat16 kernels against float64


def tell(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


# ---- part 1: the environment and the kernels -------------------------------------------------------------------------


def environment(given: argparse.Namespace) -> None:
    """Versions, driver, and what is missing."""
    tell(python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda, cores=os.cpu_count())
    for name in ("triton", "flash_attn_interface", "numba", "brotli", "sentencepiece"):
        try:
            found = __import__(name)
            tell(package=name, version=str(getattr(found, "__version__", "there")))
        except Exception as error:
            tell(package=name, missing=f"{type(error).__name__}: {error}")
    if shutil.which("nvidia-smi"):
        query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit"
        asked = ["nvidia-smi", query, "--format=csv"]
        print(subprocess.run(asked, capture_output=True, text=True, check=False).stdout, flush=True)
    for name, backend in BACKENDS.items():
        tell(attention=name, unavailable=backend.unavailable(ALONE.device, torch.bfloat16, True))
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        tell(free_gib=round(free / 2**30, 1), total_gib=round(total / 2**30, 1))
    tell(disk_free_gib=round(shutil.disk_usage(given.out).free / 2**30, 1))


def relative(found: Tensor, expected: Tensor) -> float:
    exact = expected.detach().double()
    return float((found.detach().double() - exact).norm() / exact.norm())


def attention(given: argparse.Namespace) -> None:
    """Every backend that can run, forward and backward in bfloat16, against the definition in float64."""
    device, dtype = ALONE.device, torch.float32 if given.dry else torch.bfloat16
    batch, heads, kv_heads, seq_len, head_dim = (2, 4, 2, 64, 16) if given.dry else (4, 8, 4, 2048, 64)
    generator = torch.Generator().manual_seed(0)
    given_qkv = [torch.randn(batch, n, seq_len, head_dim, generator=generator) for n in (heads, kv_heads, kv_heads)]
    document = (torch.rand(batch, seq_len, generator=generator) < 4 / seq_len).cumsum(1)
    wrong = []
    for isolated in (False, True):
        ids = document if isolated else None
        exact = [x.to(device, dtype).to(torch.float64).requires_grad_() for x in given_qkv]
        mask = torch.ones(seq_len, seq_len, dtype=torch.bool, device=device).tril()
        if ids is not None:
            mask = mask & (ids[:, :, None] == ids[:, None, :]).to(device)[:, None]
        keys, values = (x.repeat_interleave(heads // kv_heads, dim=1) for x in exact[1:])
        scores = (exact[0] @ keys.mT / head_dim**0.5).masked_fill(~mask, float("-inf"))
        expected = scores.softmax(-1) @ values
        weights = torch.randn(expected.shape, generator=generator).to(device)
        (expected * weights).sum().backward()
        for name, backend in BACKENDS.items():
            if reason := backend.unavailable(device, dtype, True):
                tell(attention=name, isolated=isolated, unavailable=reason)
                continue
            # Heads beside positions, as pieces of one tensor: so a step in bfloat16 has them.
            whole = torch.cat([x.to(device, dtype).transpose(1, 2) for x in given_qkv], dim=2).requires_grad_()
            pieces = whole.split((heads, kv_heads, kv_heads), dim=2)
            tokens = torch.zeros(batch, seq_len, dtype=torch.int64)
            found = Reach(backend, backend.reach(tokens, ids, device)).attend(*(x.transpose(1, 2) for x in pieces))
            (found.float() * weights).sum().backward()
            assert whole.grad is not None
            gradients = whole.grad.split((heads, kv_heads, kv_heads), dim=2)
            pairs = zip(gradients, exact, strict=True)
            errors = [relative(ours.transpose(1, 2), theirs.grad) for ours, theirs in pairs]  # type: ignore[arg-type]
            tell(attention=name, isolated=isolated, forward=relative(found, expected), q_k_v_gradients=errors)
            if relative(found, expected) > FORWARD_LIMIT or max(errors) > BACKWARD_LIMIT:
                wrong.append(f"{name}, {'isolated' if isolated else 'packed'}")
    if wrong:
        raise SystemExit(f"further from float64 than bfloat16 may be: {'; '.join(wrong)}")


def copies(given: argparse.Namespace) -> None:
    """Which kind of copy each way of sending a batch is, by the profiler: only pinned memory is asynchronous."""
    device = ALONE.device
    windows = torch.randint(8192, (48, 2049))
    ways: dict[str, Callable[[], Tensor]] = {
        "to_device of a strided view": lambda: to_device(windows[:, :-1], device),
        "page-locked beforehand": lambda: page_locked(windows[:, :-1]).to(device, non_blocking=True),
        "pageable": lambda: windows.to(device, non_blocking=True),
    }
    if given.dry:
        tell(copies="no GPU to copy to", to_device=torch.equal(to_device(windows[:, :-1], device), windows[:, :-1]))
        return
    for name, send in ways.items():
        send()
        with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
            send()
            torch.cuda.synchronize()
        kinds = [event.key for event in profile.key_averages() if "Memcpy" in event.key]
        tell(way=name, kinds=kinds)
        if name.startswith("to_device") and not any("Pinned" in kind for kind in kinds):
            raise SystemExit(f"{name} is not asynchronous: {kinds}")


def kernels(given: argparse.Namespace) -> None:
    """The Triton kernels' laws, on the GPU where there is one, and their speed."""
    chosen = ["tests/trainer/test_kernels.py", "--gpu", "-q", "-p", "no:cacheprovider", "-rs"]
    if given.dry:
        chosen += ["-k", "switch_of_its_own or eager_is_the_default"]
    code = subprocess.run([sys.executable, "-m", "pytest", *chosen], cwd=REPOSITORY, check=False).returncode
    if not given.dry:
        words = [sys.executable, "-m", "benchmarks.bench_kernels"]
        code = code or subprocess.run(words, cwd=REPOSITORY, check=False).returncode
    if code:
        raise SystemExit(code)


def newton_schulz(given: argparse.Namespace) -> None:
    """Seconds of the record's banks in float32 and bfloat16, and how far the updates differ."""
    shapes = [(2, 64, 96)] if given.dry else [(22, 512, 512), (22, 256, 512), (11, 2048, 512), (11, 512, 2048)]
    for shape in shapes:
        gradients = torch.randn(shape, device=ALONE.device)
        seconds: dict[str, float] = {}
        for dtype in (None, torch.bfloat16):
            for _ in range(3):
                _wait()
                started = time.perf_counter()
                orthogonalize(gradients, "polar_express", dtype)
                _wait()
                seconds[str(dtype)] = time.perf_counter() - started
        errors = {
            scheme: relative(orthogonalize(gradients, scheme, torch.bfloat16), orthogonalize(gradients, scheme))
            for scheme in COEFFICIENTS
        }
        tell(shape=shape, seconds=seconds, errors=errors)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def data_of(out: Path, vocab_size: int) -> DataFolder:
    """Return the standard library as a data folder, built once in a session."""
    folder = out / f"data_{vocab_size}"
    return DataFolder.open(folder) if folder.is_dir() else build_data(out, vocab_size)


# ---- parts 2 and 3: the trainer --------------------------------------------------------------------------------------


def train(given: argparse.Namespace) -> None:
    """Steps of the record model without and with loops: tokens/s, MFU, peak memory; with --trace the kernels too."""
    folder = given.out / f"train-{given.label}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if given.dry:
        data, recipe, tokens, count = data_of(given.out, 512), "tiny_cpu.toml", 128, 2
        # what a CPU cannot have is left out: the step's own code runs all the same
        overrides = [one for one in given.set if not one.startswith(("run.kernels", "run.attention=varlen"))]
        overrides = [one for one in overrides if "micro_batch_tokens" not in one]
        overrides += ["data.seq_len=64", f"data.batch_tokens={tokens}", "run.warmup_steps=1", "run.compile=false"]
    else:
        data, recipe, tokens, count = data_of(given.out, 8192), "record_8xh100.toml", RECORD_TOKENS, RECORD_STEPS
        overrides = [f"data.batch_tokens={tokens}", f"data.micro_batch_tokens={tokens}", "run.warmup_steps=3"]
        overrides += given.set
    overrides += ["model.num_loops=0"] if given.without_loops else []  # half of the minutes that compiling takes
    trainer = trainer_for(recipe, data.path, folder, 0.0, *overrides)
    warmed = warm_up(trainer.state, trainer.gradients)
    backend = trainer.model.attention_backend.name
    tell(label=given.label, attention=backend, compiled=trainer.gradients.compiled, warm_up=warmed)
    for loops in sorted({0, trainer.model.config.max_active_loops}):
        trainer.state.set_active_loops(loops)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(count):
            before = trainer.state.train_seconds
            trainer.timed_step(0.0)
            seconds.append(trainer.state.train_seconds - before)
        rate = tokens / statistics.median(seconds)
        facts: dict[str, Any] = {"label": given.label, "loops": loops, "tokens_per_second": round(rate)}
        facts["mfu_of_an_h100"] = round(rate * flops_per_token(trainer.model.config, loops) / H100_FLOPS, 4)
        if not given.dry:
            facts["ratio_to_the_record"] = round(rate / PUBLISHED[loops], 3)
            facts["peak_mib"] = torch.cuda.max_memory_allocated() >> 20
        tell(**facts)
        if given.trace:
            _trace(trainer, given.out / f"trace-loops{loops}", loops)


def _trace(trainer: Any, path: Path, loops: int) -> None:
    """Profile three steps: a table of kernels, launches of a step, and the share of time in which the GPU was idle."""
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        started = time.perf_counter()
        for _ in range(3):
            trainer.timed_step(0.0)
        wall = time.perf_counter() - started
    events = profile.key_averages()
    sort = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    path.with_suffix(".txt").write_text(events.table(sort_by=sort, row_limit=60))
    if torch.cuda.is_available():
        profile.export_chrome_trace(str(path.with_suffix(".json.gz")))
        on_gpu = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        busy = sum(event.self_device_time_total for event in on_gpu) / 1e6
        tell(loops=loops, launches_per_step=len(on_gpu) // 3, idle_share=round(1 - min(1.0, busy / wall), 3))


def kill_and_resume(given: argparse.Namespace) -> None:
    """A small compiled run is killed and goes on from its last checkpoint, to the end."""
    root = given.out / "killed"
    shutil.rmtree(root, ignore_errors=True)
    data = data_of(given.out, 512)
    settings = [
        f"data.dir={data.path}", f"run.checkpoint_root={root}", "data.seq_len=64", "data.batch_tokens=256",
        "schedule.steps=40", "checkpoint.every_steps=8", "checkpoint.metric_tokens=640", "run.warmup_steps=1",
        "optim.momentum_warmup_steps=5", f"run.compile={str(not given.dry).lower()}",
    ]  # fmt: skip
    words = [sys.executable, "-m", "trainer", "trainer/recipes/tiny_cpu.toml"]
    words += [word for setting in settings for word in ("--set", setting)]
    process = subprocess.Popen(words, cwd=REPOSITORY, start_new_session=True)
    try:
        while process.poll() is None and not list(root.glob("*/step_*-periodic/meta.json")):
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    saved = sorted(root.glob("*/step_*-periodic"))
    if not saved:
        raise SystemExit("the run left no checkpoint to go on from")
    say(f"killed; going on from {saved[-1]}")
    subprocess.run([*words, "--resume", str(saved[-1])], cwd=REPOSITORY, check=True)
    final = Checkpoint.open(next(root.glob("*/step_*-final")))
    tell(step=final.meta["step"], views={name: view.get("metric", {}) for name, view in final.meta["views"].items()})


def one_rank(given: argparse.Namespace) -> None:
    """A short run under torchrun with one process: on a GPU its group is NCCL's."""
    root = given.out / "one-rank"
    shutil.rmtree(root, ignore_errors=True)
    data = data_of(given.out, 512)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    settings = [
        f"data.dir={data.path}", f"run.checkpoint_root={root}", "data.seq_len=64", "data.batch_tokens=256",
        "schedule.steps=6", "checkpoint.metric_tokens=640", "run.compile=false", "optim.momentum_warmup_steps=2",
    ]  # fmt: skip
    words = [word for setting in settings for word in ("--set", setting)]
    run = [*launcher, "-m", "trainer", "trainer/recipes/tiny_cpu.toml", *words]
    subprocess.run(run, cwd=REPOSITORY, check=True)


# ---- part 4: after training ------------------------------------------------------------------------------------------


def small_run(given: argparse.Namespace) -> None:
    """A run of 90 seconds whose checkpoints the other steps of the part start from."""
    root = given.out / "small" / "checkpoints"
    shutil.rmtree(root, ignore_errors=True)
    data = data_of(given.out, 512 if given.dry else 1024)
    settings = [f"data.dir={data.path}", f"run.checkpoint_root={root}", "checkpoint.metric_tokens=16384"]
    if given.dry:
        settings += ["data.seq_len=64", "data.batch_tokens=256", "schedule.steps=10", "optim.momentum_warmup_steps=2"]
        recipe = "tiny_cpu.toml"
    else:
        settings += ["schedule.seconds=90", "schedule.steps=100000", "data.batch_tokens=65536"]
        recipe = "small_cpu.toml"
    words = [word for setting in settings for word in ("--set", setting)]
    run = [sys.executable, "-m", "trainer", f"trainer/recipes/{recipe}", *words]
    subprocess.run(run, cwd=REPOSITORY, check=True)


def command(given: argparse.Namespace) -> None:
    """One command of the package, as a person would type it."""
    name, *words = given.words
    run_as_typed(name, *words)


def run_as_typed(module: str, *words: object) -> None:
    sys.argv = [module, *map(str, words)]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


SWEEP = """
question = "Does a sweep run on this device?"
rank_by = "expected"

[grid]
"*.hessian_lambda" = [0, 0.2]

[calibration]
tokens = {calibration}

[stages.expected]
tokens = {scored}

[stages.ttt]
preset = "sgd"
set = ["chunk_tokens={chunk}", "epochs=1", "stride={stride}"]
max_tokens = {learned}
"""


def sweep(given: argparse.Namespace) -> None:
    """Trials of two quantizations, each with a stage that learns and one that is compiled on a GPU."""
    small = {"calibration": 512, "scored": 320, "chunk": 64, "stride": 16, "learned": 200}
    large = {"calibration": 262_144, "scored": 262_144, "chunk": 8192, "stride": 64, "learned": 65_536}
    spec = given.out / "small" / "sweep.toml"
    spec.write_text(SWEEP.format(**(small if given.dry else large)), encoding="utf-8")
    results = given.out / "small" / "results"
    where = ("--checkpoint", given.trained / "latest", "--root", given.trained, "--results", results)
    run_as_typed("pgolf_post", "sweep", "run", spec, *where, "--json")


STEPS: dict[str, Callable[[argparse.Namespace], None]] = {
    "environment": environment,
    "attention": attention,
    "copies": copies,
    "kernels": kernels,
    "newton_schulz": newton_schulz,
    "train": train,
    "kill_and_resume": kill_and_resume,
    "one_rank": one_rank,
    "small_run": small_run,
    "command": command,
    "sweep": sweep,
}


def write_peak(path: Path) -> None:
    """Leave this process's peak memory in a file: of the GPU where it used one, else of the host."""
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    path.write_text(json.dumps({"peak_mib": torch.cuda.max_memory_allocated() >> 20 if on_gpu else host}))


def main() -> None:
    words = sys.argv[1:]
    rest = words[words.index("--") + 1 :] if "--" in words else []
    words = words[: words.index("--")] if "--" in words else words
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("name", choices=STEPS)
    parser.add_argument("--out", type=Path, required=True, help="Folder for what the step writes.")
    parser.add_argument("--dry", action="store_true", help="Run small, on the CPU.")
    parser.add_argument("--peak", type=Path, help="File for the peak memory in MiB.")
    parser.add_argument("--label", default="default", help="Name of a training variant.")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE change of the recipe.")
    parser.add_argument("--without-loops", action="store_true", help="Train a model that has no loops.")
    parser.add_argument("--trace", action="store_true", help="Profile steps.")
    parser.add_argument("--trained", type=Path, help="Checkpoint root of the small run.")
    given = parser.parse_args(words)
    given.words = rest
    if given.peak:
        atexit.register(write_peak, given.peak)
    STEPS[given.name](given)


if __name__ == "__main__":
    main()
