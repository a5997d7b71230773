"""The page of experiments: each has a line, and a dry run of a recipe of ours accepts every line that has keys."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

import trainer.plan.dry_run
from pgolf_post.errors import SettingsError
from pgolf_post.settings import apply_override, parse_settings, read_toml
from trainer.config import Recipe
from trainer.model.architecture import ModelConfig
from trainer.plan.dry_run import dry_run, require_no_refusal
from trainer.schedule.step_times import StepTimes

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "howto" / "say_it.md"
BASES: dict[str, list[str]] = {  # recipe → what the experiments' bases have beside it
    "record_8xh100": [],
    "baseline_sp1024": ["model.bigram_buckets=10240", "model.bigram_dim=128"],
    "baseline_sp1024, 11 layers": ["model.num_layers=11", "model.bigram_buckets=10240"],
}
SETTING = re.compile(r"`((?:run|data|model|optim|schedule|loss|init|qat|meta_ttt)\.\w+) = ([^`]+)`")
SAYS_SOMETHING = re.compile(
    r"`|not said|nothing to set|not run there|stages of|groups of|heads of later|left out|together"
)


@cache
def rows() -> dict[str, str]:
    """Experiment, as its line names it → the line's last cell."""
    lines = [line.strip("|").split(" | ") for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| ")]
    return {line[0].strip(): line[-1] for line in lines if len(line) == 3 and "---" not in line[0]}


def settings_of(experiment: str) -> list[tuple[str, str]]:
    """The settings that a line gives."""
    return SETTING.findall(rows()[experiment])


def named(cell: str) -> set[str]:
    """The experiments that a cell names: "D4, D5" two, "015 to 024" ten."""
    names, first = set(), " (first)" if "(first)" in cell else ""
    for part in re.sub(r" *\(.*?\)", "", cell).split(", "):
        if match := re.fullmatch(r"([A-Z]*)(\d+) to \1(\d+)", part):
            digits = len(match[2])
            names |= {f"{match[1]}{n:0{digits}d}{first}" for n in range(int(match[2]), int(match[3]) + 1)}
        else:
            names.add(part + first)
    return names


def numbered(prefix: str, *numbers: int | range) -> set[str]:
    each = [n for one in numbers for n in (one if isinstance(one, range) else (one,))]
    return {f"{prefix}{n}" for n in each}


RTX = (  # 131 that ran or crashed, and those that were planned
    numbered("", range(1, 7)) | numbered("N", range(1, 7)) | numbered("U", range(1, 11)) | numbered("NF", range(1, 17))
    | {f"W0{letter}" for letter in "abcde"} | numbered("W", range(1, 11)) | {"E1 (first)", "E13"}
    | {f"E{n} (first)" for n in (*range(2, 13), *range(14, 26))} | numbered("A", range(1, 19))
    | numbered("B", range(1, 6)) | numbered("C", range(1, 15)) | numbered("D", range(1, 11))
    | numbered("E", range(1, 11)) | numbered("F", range(1, 11)) | numbered("G", 1, 3) | numbered("H", range(1, 7))
)  # fmt: skip
H100 = (
    {f"exp0{n}" for n in (0, *range(2, 10))} | {"exp01b", "exp01c", "exp01d"} | numbered("exp", range(10, 19))
    | {f"exp{n}b" for n in (*range(27, 40), *range(42, 49), *range(53, 60), 61)} | {"clean_54b", "clean_54b_v2"}
    | numbered("exp", range(63, 88), range(90, 94), range(95, 102), range(106, 120)) - {"exp94"}
    | {"exp60", "exp77old", "exp105a", "exp70_parallel_muon", "exp70_vram_opt", "exp70_cuda_fused", "reverted_exp70"}
)  # fmt: skip


def test_every_experiment_has_a_line() -> None:
    there = {name for cell in rows() for name in named(cell)}
    assert RTX - there == set()
    assert H100 - there == set()
    assert {cell for cell, said in rows().items() if cell != "experiment" and not SAYS_SOMETHING.search(said)} - {
        "spec", "E2 to E12, E14 to E25 (first)"
    } == set()  # fmt: skip


def refusal(base: str, settings: list[tuple[str, str]]) -> str:
    """Why the dry run of a recipe does not accept settings; empty if it does."""
    tree = read_toml(ROOT / "trainer" / "recipes" / f"{base.partition(',')[0]}.toml")
    for override in (*BASES[base], *(f"{key}={value}" for key, value in settings)):
        apply_override(tree, override)
    try:
        recipe = parse_settings(Recipe, tree, base)
        require_no_refusal(dry_run(recipe, StepTimes.given(recipe.model, 0.1, None)).findings, base)
    except SettingsError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("experiment", [name for name in rows() if settings_of(name)])
def test_a_dry_run_accepts_a_line(experiment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.plan.dry_run, "free_bytes", lambda _: 10**13)  # this machine's disk decides nothing
    settings = [(key, value) for key, value in settings_of(experiment) if "…" not in value]
    refusals: dict[str, str] = {}
    for base in BASES:
        refusals[base] = refusal(base, settings)
        if not refusals[base]:
            return
    raise AssertionError(refusals)


def test_a_line_that_cannot_act_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.plan.dry_run, "free_bytes", lambda _: 10**13)
    for key, value in (("model.no_such_key", "1"), ("model.mlp_mult", "[4, 4]"), ("schedule.loops_at", "1.0")):
        assert refusal("record_8xh100", [(key, value)]), key


def test_every_setting_of_a_part_stands_on_the_page_of_settings() -> None:
    from trainer.model.parts import settings_of_parts

    page = (ROOT / "docs" / "model_settings.md").read_text("utf-8")
    assert {key for key in settings_of_parts(ModelConfig) if f"`{key}`" not in page} == set()
