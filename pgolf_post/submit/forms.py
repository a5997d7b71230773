"""The forms of a handed-in program: which function it starts at, and what is known of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pgolf_post.errors import SettingsError
from pgolf_post.families import build_module, get_family
from pgolf_post.pack import decode
from pgolf_post.pack.snippet import decoder_module
from pgolf_post.score.protocols import Protocol
from pgolf_post.score.ttt.methods import ttt_method
from pgolf_post.score.ttt.scales import ScalesProtocol
from pgolf_post.score.ttt.settings import TTTProtocol
from pgolf_post.settings import Settings
from pgolf_post.submit import evaluate
from pgolf_post.submit.amalgamate import Amalgam, amalgamate
from pgolf_post.submit.known import Facts, Partly
from pgolf_post.submit.sources import Sources, address

# Calls that only talk to people, or repeat checks that our scorer has made of the same model and protocol.
SILENT = ("say", "observe", "require_zero_is_plain", "require_same_forward")

# Methods whose names other methods have.
UNUSED = ("pgolf_post.base.ranks:Ranks.join", "pgolf_post.score.bpb:Score.load", "pgolf_post.score.bpb:Score.save")


def eval_form(config: Mapping[str, Any], protocol: Protocol) -> Amalgam:
    """Return the program that scores an artifact of this config by this protocol.

    Raises SettingsError for a model whose family does not say its settings in a class.
    """
    module: Any = build_module(config)
    settings = getattr(module, "config", None)
    if not isinstance(settings, Settings):
        raise SettingsError(
            f"family {config['family']!r} has no settings class in its module, which a script could be made from",
            hint="submit makes scripts of models like golf_gpt, whose module keeps its settings as `config`",
        )
    kind = type(module)
    sources = Sources(["pgolf_post", kind.__module__.partition(".")[0]], {decode.__name__: decoder_module()})
    here = evaluate.__name__
    values = {**_by_class(settings), **_by_class(module.graph), **_by_class(protocol)}
    values[address("pgolf_post.score.protocols", "Protocol")] = protocol
    values[address("pgolf_post.score.ttt.chunks", "P")] = protocol
    values[address("pgolf_post.score.session", "Session")] = Partly({"observer": None, "quiet": True})
    facts = Facts(
        values,
        {address(here, "known_protocol"): protocol, **_answers(module, config, protocol)},
        module,
        absent=frozenset({"log_probs"}),
        pure=frozenset({kind.__module__.partition(".")[0]}),
    )
    model = address(kind.__module__, kind.__qualname__)
    sources.replace(address(here, "known_model"), "def known_model():\n    return Model(None, None)", {"Model": model})
    spans = f"sliding_spans(targets, {protocol.seq_len}, {_stride(protocol)})"
    source = f"def protocol_spans(protocol, targets):\n    return {spans}"
    sources.replace(address("pgolf_post.score.protocols", "protocol_spans"), source)
    if isinstance(protocol, TTTProtocol):
        _, make = ttt_method(protocol.method).load()
        sources.replace(address("pgolf_post.score.protocols", "make_pass"), MAKE_PASS, {"Pass": _address_of(make)})
    if isinstance(protocol, ScalesProtocol):  # trains the parameters of one role
        roles = get_family(config["family"]).role
        control = {name: "control" for name, _ in module.named_parameters() if roles(name) == "control"}
        sources.replace(address(here, "family"), f"def family():\n    return SimpleNamespace(role={control!r}.get)")
    return amalgamate(sources, address(here, "main"), facts, _silent(sources), UNUSED)


MAKE_PASS = """
def make_pass(module: Any, family: ModelFamily, tokens: np.ndarray, protocol: Protocol, session: Session) -> Pass:
    log = CommitLog(tokens, num_targets(len(tokens), protocol.seq_len, protocol.tail))
    return Pass(module, family, log, protocol, session)
"""


def _address_of(defined: Any) -> str:
    return address(defined.__module__, defined.__qualname__)


def _stride(protocol: Protocol) -> int:
    """Return the stride of a protocol's windows; plain ones lie side by side."""
    return getattr(protocol, "stride", protocol.seq_len)


def _by_class(settings: Settings) -> dict[str, Any]:
    """Return settings under the address of every settings class that they are of."""
    classes = [kind for kind in type(settings).__mro__ if issubclass(kind, Settings) and kind is not Settings]
    return {address(kind.__module__, kind.__qualname__): settings for kind in classes}


def _answers(module: Any, config: Mapping[str, Any], protocol: Protocol) -> dict[str, Any]:
    """Return what functions that ask the family answer for this model."""
    from pgolf_post.score.ttt.adapters import AdapterProtocol, adapted_modules

    if isinstance(protocol, AdapterProtocol):
        paths = adapted_modules(module, get_family(config["family"]), protocol)
        return {address(adapted_modules.__module__, adapted_modules.__qualname__): paths}
    return {}


def _silent(sources: Sources) -> list[str]:
    own = [address("pgolf_post.base.progress", "say"), address("pgolf_post.score.nats", "observe")]
    return [*own, *SILENT, address("pgolf_post.score.ttt.gradients", "require_same_forward")]
