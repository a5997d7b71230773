"""The methods of test-time training, and the presets by name.

A new method is one file of this folder, with a settings class and a pass, and one row here. Rows import their file on
use: a command's --help lists the names without loading torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pgolf_post.errors import SettingsError
from pgolf_post.score.ttt.settings import TTTProtocol
from pgolf_post.settings import apply_override, parse_settings

if TYPE_CHECKING:
    from pgolf_post.families import ModelFamily
    from pgolf_post.score.commits import CommitLog
    from pgolf_post.score.session import Pass, Session

    MakePass = Callable[[Any, ModelFamily, CommitLog, Any, Session], Pass]


@dataclass(frozen=True)
class TTTMethod:
    """A row of the table."""

    load: Callable[[], tuple[type[TTTProtocol], MakePass]]  # its settings class, and what makes a pass of them
    trains: str  # which numbers learn
    reads: str  # the scored text that a step may use
    source: str
    preset: Mapping[str, Any] = field(default_factory=dict)  # its usual settings where they are not its class's


def _sgd() -> tuple[type[TTTProtocol], MakePass]:
    from pgolf_post.score.ttt.sgd import SGDPass, SGDProtocol

    return SGDProtocol, SGDPass


def _scales() -> tuple[type[TTTProtocol], MakePass]:
    from pgolf_post.score.ttt.scales import ScalesPass, ScalesProtocol

    return ScalesProtocol, ScalesPass


def _lora() -> tuple[type[TTTProtocol], MakePass]:
    from pgolf_post.score.ttt.lora import LoraPass, LoraProtocol

    return LoraProtocol, LoraPass


def _phased() -> tuple[type[TTTProtocol], MakePass]:
    from pgolf_post.score.ttt.phased import PhasedPass, PhasedProtocol

    return PhasedProtocol, PhasedPass


PR_1855: dict[str, Any] = {
    "chunk_tokens": 48,
    "optimizer": "adamw",
    "learning_rate": 1e-4,
    "beta1": 0.0,
    "beta2": 0.99,
    "eps": 1e-10,
    "weight_decay": 0.5,
}
SCALES: dict[str, Any] = {"optimizer": "adamw", "learning_rate": 1e-3, "epochs": 1}

TTT_METHODS: dict[str, TTTMethod] = {
    "sgd": TTTMethod(_sgd, "all weights", "the chunk just scored", "openai/parameter-golf PR #1493"),
    "scales": TTTMethod(_scales, "gains, mixes, gates", "the chunk just scored", "as PR #1493, less of it", SCALES),
    "lora": TTTMethod(
        _lora, "an adapter per document", "the document's last chunk", "Hu et al. 2021; PR #1855", PR_1855
    ),
    "phased": TTTMethod(
        _phased, "as lora, and all weights", "as lora, and fully scored documents", "PR #1855", PR_1855
    ),
}
PRESETS: dict[str, dict[str, Any]] = {
    # published settings with their own window; a method's own name is its preset for the model's window
    "sgd-1493": {"method": "sgd", "seq_len": 2048},
    "record-1855": {"method": "phased", "seq_len": 2048, **PR_1855},
    **{name: {"method": name, **row.preset} for name, row in TTT_METHODS.items()},
}


def ttt_method(name: str) -> TTTMethod:
    """Return a method's row. Raises SettingsError naming the methods there are."""
    if name not in TTT_METHODS:
        raise SettingsError(f"no TTT method {name!r}; there are: {', '.join(TTT_METHODS)}")
    return TTT_METHODS[name]


def ttt_protocol(preset: str, overrides: Iterable[str], common: dict[str, Any], window: int) -> TTTProtocol:
    """Return a preset with `key=value` overrides and the options all protocols share.

    `window` is seq_len where neither the preset nor an override names it. Raises SettingsError for a preset, method,
    key or value that does not exist, naming those that do.
    """
    if preset not in PRESETS:
        raise SettingsError(f"no TTT preset or method {preset!r}; there are: {', '.join(PRESETS)}")
    tree = {"seq_len": window, **PRESETS[preset], **{key: value for key, value in common.items() if value is not None}}
    for override in overrides:
        apply_override(tree, override)
    method = str(tree["method"])
    settings, _ = ttt_method(method).load()
    return parse_settings(settings, tree, f"--ttt {preset}" if method == preset else f"--ttt {preset} ({method})")
