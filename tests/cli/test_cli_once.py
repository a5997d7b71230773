"""Work that one command does once: decode an artifact, build a meta-module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

import pgolf_post.artifacts
import pgolf_post.checkpoint
import pgolf_post.families
import pgolf_post.pack.artifact
import pgolf_post.score.cached
import pgolf_post.score.stage


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are decoded, in order."""
    paths: list[Path] = []
    read = pgolf_post.pack.artifact.read_artifact

    def counted(path: Path) -> Any:
        paths.append(path)
        return read(path)

    for module in (pgolf_post.pack.artifact, pgolf_post.score.cached, pgolf_post.score.stage, pgolf_post.artifacts):
        monkeypatch.setattr(module, "read_artifact", counted)
    return paths


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The family of every module that is built, in order."""
    names: list[str] = []
    build = pgolf_post.families.build_module

    def counted(config: Any) -> nn.Module:
        names.append(str(config["family"]))
        return build(config)

    for module in (pgolf_post.checkpoint, pgolf_post.families):
        monkeypatch.setattr(module, "build_module", counted)
    return names


def test_requant_decodes_every_artifact_once(pgolf: Any, decodes: list[Path]) -> None:
    """Verified, scored and compared with the control: a trial's file is decoded when it is written, and only then."""
    options = ("--calibration-tokens", 512, "--eval", "--eval-tokens", 300, "--json")
    answer = pgolf("requant", "--block-size", "64,128", "--lambda", "0,0.4", *options)
    assert answer.code == 0, answer.err
    assert [trial["no_op"] for trial in answer.json["trials"]] == [False, True, False, False]
    assert len(decodes) == 4
    decodes.clear()
    assert pgolf("requant", "--lambda", 0.4, *options).json["artifact_cached"]
    assert len(decodes) == 1  # for the score


def test_fit_decodes_its_artifact_once(pgolf: Any, decodes: list[Path]) -> None:
    options = ("--calibration-tokens", 512, "--kappa", "off", "--eval", "--eval-tokens", 300, "--json")
    assert pgolf("fit", "--budget", 9000, *options).code == 0
    assert len(decodes) == 1


def test_requant_builds_a_module_to_look_at_one_to_calibrate_and_one_to_score(pgolf: Any, builds: list[str]) -> None:
    """Where everything is cached, the view's own is left."""
    options = ("--calibration-tokens", 512, "--eval", "--eval-tokens", 300)
    assert pgolf("requant", *options).code == 0
    assert len(builds) == 3
    builds.clear()
    assert pgolf("requant", *options).code == 0
    assert len(builds) == 1
