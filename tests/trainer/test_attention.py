"""Attention backends: one definition, whichever kernel computes it.

FlashAttention-3 and torch's varlen kernels run on GPUs only; here their places are taken by slow kernels of the same
signatures, so that what is handed to them (layout, boundaries, grouped queries) is what they document.
"""

from __future__ import annotations

import math
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from importlib.machinery import ModuleSpec
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.errors import SettingsError
from tests.conftest import pico_recipe
from tests.trainer.test_model import BANKED, TOLERANCE, load_fixture, pico_model
from trainer.model import attention_backends
from trainer.model import varlen as trainer_varlen
from trainer.model.attention import apply_rotary, rotary_angles, rotate_whole, whole_angles
from trainer.model.attention_backends import (
    BACKENDS,
    SDPA,
    BackendName,
    Reach,
    choose_backend,
    document_boundaries,
    warning_of,
)
from trainer.run.loop import Trainer

CPU = torch.device("cpu")
DOCUMENT = torch.tensor([[0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 3], [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2]])


def naive_attention(q: Tensor, k: Tensor, v: Tensor, document: Tensor | None) -> Tensor:
    """Position by position, as it is defined. Shapes as for `Reach.attend`."""
    group, rows = q.size(1) // k.size(1), []
    for batch in range(q.size(0)):
        for head in range(q.size(1)):
            keys, values = k[batch, head // group], v[batch, head // group]
            for i in range(q.size(2)):
                past = [j for j in range(i + 1) if document is None or document[batch, j] == document[batch, i]]
                scores = keys[past] @ q[batch, head, i] / math.sqrt(q.size(3))
                rows.append(torch.softmax(scores, 0) @ values[past])
    return torch.stack(rows).view_as(q)


def naive_ragged(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Causal attention over documents as one ragged batch, each (total, heads, head_dim)."""
    assert all(t.stride(-1) == 1 for t in (q, k, v))
    assert cu_seqlens.dtype == torch.int32
    edges = cu_seqlens.tolist()
    parts = []
    for start, end in pairwise(edges):
        one = [t[start:end].transpose(0, 1)[None] for t in (q, k, v)]
        parts.append(naive_attention(*one, None)[0].transpose(0, 1))
    return torch.cat(parts)


def _cpu_varlen(query, key, value, cu_q, cu_k, max_q, max_k, is_causal, scale, window, enable_gqa=False, *rest):  # type: ignore[no-untyped-def]
    assert torch.equal(cu_q, cu_k)
    assert is_causal
    assert scale is None
    assert max_q == max_k >= int(cu_q.diff().max())
    assert enable_gqa == ("enable_gqa" in trainer_varlen.PARAMETERS and query.size(1) != key.size(1))
    out = naive_ragged(query, key, value, cu_q)
    return out, query.new_zeros(query.size(1), query.size(0)), torch.zeros(2, dtype=torch.uint64)


def _cpu_varlen_backward(grad_out, query, key, value, out, lse, cu_q, *rest):  # type: ignore[no-untyped-def]
    def differentiate() -> tuple[Tensor, ...]:
        inputs = [t.detach().requires_grad_() for t in (query, key, value)]
        return torch.autograd.grad(naive_ragged(*inputs, cu_q), inputs, grad_out)

    with ThreadPoolExecutor(1) as elsewhere:  # inside an operator this thread records no gradients
        return elsewhere.submit(differentiate).result()


@cache
def give_varlen_cpu_kernels() -> None:
    """Let torch's own varlen operator run on the CPU, for the rest of this process."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    varlen._varlen_attn.register_kernel("cpu")(_cpu_varlen)
    varlen._varlen_attn_backward.register_kernel("cpu")(_cpu_varlen_backward)


@pytest.fixture
def varlen_on_cpu() -> None:
    give_varlen_cpu_kernels()


class StandInVarlen(torch.autograd.Function):
    """FlashAttention-3's form: an autograd function of all tensors that are given to it, boundaries included."""

    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(q, k, v, cu_seqlens_q)
        if torch.compiler.is_compiling():  # traced: operators of unknown insides, as FlashAttention-3's are
            return fa3_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen)
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert max_seqlen >= int(cu_seqlens_q.diff().max())
        return naive_ragged(q, k, v, cu_seqlens_q)

    @staticmethod
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        if torch.compiler.is_compiling():
            return *fa3_backward(grad_out.contiguous(), *ctx.saved_tensors), None, None, None
        *tensors, cu_seqlens = ctx.saved_tensors
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_() for t in tensors]
            gradients = torch.autograd.grad(naive_ragged(*inputs, cu_seqlens), inputs, grad_out)
        return *gradients, None, None, None


@torch.library.custom_op("pgolf_test::fa3_forward", mutates_args=())
def fa3_forward(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_seqlen: int) -> Tensor:
    assert torch.equal(cu_q, cu_k)
    assert max_seqlen >= int(cu_q.diff().max())
    return naive_ragged(q, k, v, cu_q)


@torch.library.custom_op("pgolf_test::fa3_backward", mutates_args=())
def fa3_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    def differentiate() -> tuple[Tensor, ...]:
        inputs = [t.detach().requires_grad_() for t in (q, k, v)]
        return torch.autograd.grad(naive_ragged(*inputs, cu_seqlens), inputs, grad_out)

    with ThreadPoolExecutor(1) as elsewhere:  # inside an operator this thread records no gradients
        return elsewhere.submit(differentiate).result()  # type: ignore[return-value]


fa3_forward.register_fake(lambda q, k, v, cu_q, cu_k, max_seqlen: torch.empty_like(q))
fa3_backward.register_fake(lambda grad_out, q, k, v, cu_seqlens: tuple(map(torch.empty_like, (q, k, v))))


def fa3_stand_in() -> ModuleType:
    """Return a module for FlashAttention-3's place."""
    module = ModuleType("flash_attn_interface")

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
        assert causal
        return naive_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None).transpose(1, 2)

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor,
        cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, causal: bool = False,
    ) -> tuple[Tensor, None]:  # fmt: skip
        assert causal
        assert max_seqlen_q == max_seqlen_k
        return StandInVarlen.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q), None

    module.__spec__ = ModuleSpec("flash_attn_interface", None)
    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func  # type: ignore[attr-defined]
    return module


@pytest.fixture
def fa3_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in, installed."""
    monkeypatch.setitem(sys.modules, "flash_attn_interface", fa3_stand_in())


def queries_keys_values(kv_heads: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v of 2 rows, 4 query heads, 11 positions and 8 dimensions, each with a gradient."""
    generator = torch.Generator().manual_seed(kv_heads)
    return [
        torch.randn(2, heads, 11, 8, generator=generator, dtype=dtype).requires_grad_()
        for heads in (4, kv_heads, kv_heads)
    ]


def attend(name: BackendName, inputs: list[Tensor], document: Tensor | None) -> Tensor:
    backend = BACKENDS[name]
    return Reach(backend, backend.reach(torch.zeros(2, 11, dtype=torch.int64), document, CPU)).attend(*inputs)


@pytest.mark.parametrize("document", [None, DOCUMENT], ids=["packed", "isolated"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", list(BACKENDS))
def test_every_backend_is_the_definition_forward_and_backward(
    name: BackendName, kv_heads: int, document: Tensor | None, varlen_on_cpu: None, fa3_on_cpu: None
) -> None:
    inputs, again = queries_keys_values(kv_heads), queries_keys_values(kv_heads)
    expected = naive_attention(*again, document)
    if name == "flex":  # no backward pass on a CPU
        torch.testing.assert_close(attend(name, [t.detach() for t in inputs], document), expected.detach())
        return
    found = attend(name, inputs, document)
    torch.testing.assert_close(found, expected)
    weights = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for ours, theirs in zip(inputs, again, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("name", ["flex", "varlen", "fa3"])
def test_a_models_logits_do_not_depend_on_the_backend(name: BackendName, varlen_on_cpu: None, fa3_on_cpu: None) -> None:
    tokens = torch.randint(2, 50, (2, 12), generator=torch.Generator().manual_seed(5))
    tokens[0, 4] = tokens[1, [0, 9, 10]] = 1
    for isolate in (False, True):
        model = pico_model(isolate_documents=isolate, smear_gate=True, lanes_start=3)
        with torch.no_grad():
            expected = model(tokens)
            model.attention_backend = BACKENDS[name]
            torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fixture", BANKED)
def test_flex_attention_gives_the_public_scripts_logits(fixture: str) -> None:
    model, tensors = load_fixture(fixture)
    model.attention_backend = BACKENDS["flex"]
    expected = next(value for key, value in tensors.items() if key.startswith("logits.T32"))
    with torch.no_grad():
        found = model(tensors["tokens.T32"].long())
    assert float((found - expected).abs().max()) < TOLERANCE


@pytest.mark.parametrize(("head_dim", "rope_dims"), [(64, 16), (8, 8), (40, 16), (8, 0)])
def test_rotating_whole_heads_is_rotating_their_first_dimensions(head_dim: int, rope_dims: int) -> None:
    x = torch.randn(2, 5, 3, head_dim, generator=torch.Generator().manual_seed(0))  # heads beside positions
    angles = rotary_angles(5, rope_dims, 1e4, torch.device("cpu"))
    turned = rotate_whole(x, *whole_angles(*angles, head_dim, torch.float32), rope_dims)
    assert torch.equal(turned.transpose(1, 2), apply_rotary(x.transpose(1, 2), *angles))


def test_boundaries_are_row_starts_and_changes_of_document() -> None:
    tokens = torch.zeros_like(DOCUMENT)
    assert document_boundaries(tokens, DOCUMENT, CPU).tolist() == [0, 3, 5, 6, 11, 12, 21, 22]
    assert document_boundaries(tokens, None, CPU).tolist() == [0, 11, 22]


def test_autocast_decides_what_attention_is_computed_in() -> None:
    inputs = queries_keys_values(2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert attend("sdpa", inputs, DOCUMENT).dtype == torch.bfloat16
        assert attend("flex", [t.detach() for t in inputs], DOCUMENT).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("flex", "no backward pass on cpu"),
        ("varlen", "needs a CUDA device, this is cpu"),
        ("fa3", "flash_attn_interface .* is not installed"),
    ],
)
def test_a_backend_that_cannot_train_here_is_refused_with_the_reason(name: BackendName, why: str) -> None:
    with pytest.raises(SettingsError, match=rf"run\.attention '{name}' is not available: .*{why}") as caught:
        choose_backend(name, CPU, torch.float32, isolated=True)
    assert "choose one of sdpa, or 'auto'" in str(caught.value.hint)


def test_without_a_backward_pass_flex_runs_on_a_cpu() -> None:
    assert choose_backend("flex", CPU, torch.float32, isolated=True, training=False).name == "flex"


@pytest.mark.parametrize(
    ("available", "isolated", "chosen"),
    [
        ({"sdpa", "flex", "varlen", "fa3"}, True, "fa3"),
        ({"sdpa", "flex", "varlen", "fa3"}, False, "fa3"),
        ({"sdpa", "flex", "varlen"}, True, "varlen"),
        ({"sdpa", "flex", "varlen"}, False, "sdpa"),
        ({"sdpa"}, True, "sdpa"),
    ],
)
def test_auto_takes_the_fastest_that_is_available(
    monkeypatch: pytest.MonkeyPatch, available: set[str], isolated: bool, chosen: str
) -> None:
    for name, backend in BACKENDS.items():
        reason = None if name in available else "it is not here"
        monkeypatch.setitem(BACKENDS, name, replace(backend, unavailable=lambda *_, reason=reason: reason))
    assert choose_backend("auto", CPU, torch.float32, isolated).name == chosen


def test_varlen_without_a_word_for_groups_is_called_without_it(
    monkeypatch: pytest.MonkeyPatch, varlen_on_cpu: None
) -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    inputs, document = queries_keys_values(2), DOCUMENT
    expected = attend("varlen", inputs, document)
    asked: list[set[str]] = []

    def groups_natively(q, k, v, cu_q, cu_k, max_q, max_k, **rest):  # type: ignore[no-untyped-def]
        asked.append(set(rest))
        return naive_ragged(q, k, v, cu_q)

    monkeypatch.setattr(varlen, "varlen_attn", groups_natively)
    monkeypatch.setattr(trainer_varlen, "PARAMETERS", frozenset({"window_size"}))
    torch.testing.assert_close(attend("varlen", inputs, document), expected)
    assert asked == [{"window_size"}]


@pytest.mark.parametrize(("error", "said"), [(0.0, None), (0.1, "differs from SDPA by"), (None, "fails: no kernel")])
def test_a_varlen_that_groups_unasked_must_give_what_sdpa_gives(
    error: float | None, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def groups_natively(q, k, v, cu_q, cu_k, max_q, max_k, **rest):  # type: ignore[no-untyped-def]
        if error is None:
            raise RuntimeError("no kernel\nfor this")
        return naive_ragged(q, k, v, cu_q) + error

    varlen = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(varlen, "varlen_attn", groups_natively)
    monkeypatch.setattr(trainer_varlen, "PARAMETERS", frozenset({"window_size"}))
    monkeypatch.setattr(attention_backends, "_half_on_cuda", lambda *_: None)
    attention_backends.varlen_disagrees.cache_clear()
    reason = BACKENDS["varlen"].unavailable(CPU, torch.bfloat16, True)
    attention_backends.varlen_disagrees.cache_clear()
    assert reason is None if said is None else said in str(reason)


def test_flash_attention_3_of_another_torch_is_told_of_and_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "flash_attn_interface.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn_interface", raising=False)
    gpu = torch.device("cuda")
    reason = BACKENDS["fa3"].unavailable(gpu, torch.bfloat16, True)
    assert "undefined symbol: _ZN3c10" in str(reason)
    warning = warning_of("auto", BACKENDS["varlen"], gpu, True, 16, 2048)
    assert warning is not None
    assert "FlashAttention-3 is installed but not used" in warning
    assert warning_of("varlen", BACKENDS["varlen"], gpu, True, 16, 2048) is None


def test_masks_that_auto_ends_at_on_a_gpu_are_told_of_with_their_cost() -> None:
    gpu = torch.device("cuda")
    assert "a mask (16, 1, 2048, 2048) of 64 MiB" in str(warning_of("auto", SDPA, gpu, True, 16, 2048))
    assert warning_of("auto", SDPA, gpu, False, 16, 2048) is None
    assert warning_of("auto", SDPA, CPU, True, 16, 2048) is None


def test_a_run_records_its_kernels_and_its_model_does_not(pico_checkpoint: Checkpoint) -> None:
    assert pico_checkpoint.meta["attention"] == SDPA.name
    assert pico_checkpoint.meta["compile"] is False
    assert pico_checkpoint.meta["warm_up"]["steps_per_graph"] == 0
    assert not {"attention", "compile"} & pico_checkpoint.config["model"].keys()


def test_a_recipe_that_names_an_absent_backend_does_not_start(pico_data: DataFolder, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"run\.attention 'fa3' is not available"):
        Trainer(pico_recipe(pico_data, tmp_path, run={"attention": "fa3"}))
