"""The forms of a handed-in program: which function it starts at, and what is known of it."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pgolf_post.calibrate.settings import CalibrationSettings
from pgolf_post.errors import SettingsError
from pgolf_post.families import build_module, get_family
from pgolf_post.pack import decode
from pgolf_post.pack.container import PackSettings
from pgolf_post.pack.snippet import decoder_module
from pgolf_post.score.protocols import Protocol
from pgolf_post.score.session import Session
from pgolf_post.score.ttt.methods import ttt_method
from pgolf_post.score.ttt.scales import ScalesProtocol
from pgolf_post.score.ttt.settings import TTTProtocol
from pgolf_post.settings import Settings
from pgolf_post.submit import evaluate, fitting
from pgolf_post.submit.amalgamate import Amalgam, amalgamate
from pgolf_post.submit.facts import ByName, Facts, Partly
from pgolf_post.submit.fit_form import (
    asked_by_fit,
    choices_of,
    settle_fit,
)
from pgolf_post.submit.makeable import is_fitted, require_makeable
from pgolf_post.submit.plan_form import asked_by_plan, plan_of, settle_plan
from pgolf_post.submit.seeds import Seed
from pgolf_post.submit.sources import Sources, address

# Calls that only talk to people, or repeat checks that our scorer has made of the same model and protocol.
SILENT = ("say", "observe", "advance", "announce", "require_zero_is_plain", "require_same_forward")

# Methods whose names other methods have.
UNUSED = ("pgolf_post.base.ranks:Ranks.join", "pgolf_post.score.bpb:Score.load", "pgolf_post.score.bpb:Score.save")


def eval_form(config: Mapping[str, Any], protocol: Protocol) -> Amalgam:
    """Return the program that scores an artifact of this config by this protocol.

    Raises SettingsError for a model whose family does not say its settings in a class.
    """
    module = settled_module(config)
    sources = _sources(module)
    here = evaluate.__name__
    sources.replace(address(here, "known_model"), "def known_model():\n    return Model(None, None)", _model(module))
    values = {**_of_model(module.config), **_by_class(module.graph)}
    facts = _facts(sources, module, config, protocol, values, {})
    return amalgamate(sources, address(here, "main"), facts, _silent(), UNUSED)


def settled_module(config: Mapping[str, Any]) -> Any:
    """Return the model on no device. Raises SettingsError if it does not keep its settings as `config`."""
    module: Any = build_module(config)
    if not isinstance(getattr(module, "config", None), Settings):
        raise SettingsError(
            f"family {config['family']!r} has no settings class in its module, which a script could be made from",
            hint="submit makes scripts of models like golf_gpt, whose module keeps its settings as `config`",
        )
    return module


def _sources(module: Any) -> Sources:
    package = type(module).__module__.partition(".")[0]
    return Sources(["pgolf_post", package], {decode.__name__: decoder_module()})


def _model(module: Any) -> dict[str, str]:
    """Return the name by which a replaced function calls the model's class."""
    return {"Model": _address_of(type(module))}


def _facts(
    sources: Sources,
    module: Any,
    config: Mapping[str, Any],
    protocol: Protocol,
    values: Mapping[str, Any],  # what is known besides the protocol, by class
    answers: Mapping[str, Any],
    shared: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> Facts:
    """Return what both forms know, and put the protocol's own pass into the sources."""
    _settle_protocol(sources, module, config, protocol)
    known = {**values, **_by_class(protocol)}
    known[address("pgolf_post.score.protocols", "Protocol")] = protocol
    known[address("pgolf_post.score.ttt.chunks", "P")] = protocol
    unset = {each.name: None for each in dataclasses.fields(Session) if each.default is None}
    known[_address_of(Session)] = Partly({**unset, "quiet": True})
    answered = {address(evaluate.__name__, "known_protocol"): protocol, **_answers(module, config, protocol), **answers}
    pure = frozenset({type(module).__module__.partition(".")[0]})
    return Facts(known, answered, shared, module, absent=frozenset({"log_probs"}), pure=pure)


def _settle_protocol(sources: Sources, module: Any, config: Mapping[str, Any], protocol: Protocol) -> None:
    """Replace what chooses among protocols by what this one is."""
    spans = f"sliding_spans(targets, {protocol.seq_len}, {_stride(protocol)})"
    source = f"def protocol_spans(protocol, targets):\n    return {spans}"
    sources.replace(address("pgolf_post.score.protocols", "protocol_spans"), source)
    if isinstance(protocol, TTTProtocol):
        _, make = ttt_method(protocol.method).load()
        sources.replace(address("pgolf_post.score.protocols", "make_pass"), MAKE_PASS, {"Pass": _address_of(make)})
    if isinstance(protocol, ScalesProtocol):  # trains the parameters of one role
        roles = get_family(config["family"]).role
        control = {name: "control" for name, _ in module.named_parameters() if roles(name) == "control"}
        source = f"def family():\n    return SimpleNamespace(role={control!r}.get)"
        sources.replace(address(evaluate.__name__, "family"), source)


def whole_form(seed: Seed, recipe: Settings, protocol: Protocol) -> Amalgam:
    """Return the program that trains by a recipe, quantizes as an artifact was quantized, packs and scores it.

    Raises SettingsError for an artifact of a fit that tuned weights or of a plan that reads its text, for fused
    kernels, and for a loss that is not plain nats.
    """
    config, module = seed.manifest["config"], settled_module(seed.manifest["config"])
    package = type(module).__module__.partition(".")[0]
    program = importlib.import_module(f"{package}.handed_in")
    known_recipe: Any = recipe
    require_makeable(seed, known_recipe)
    family, sources = get_family(config["family"]), _sources(module)
    calibration = calibration_of(seed)
    schedule = importlib.import_module(type(known_recipe.schedule).__module__)

    # functions that choose among methods, replaced by what this recipe chose
    graph = f"SimpleNamespace(active_loops={module.graph.active_loops})"
    source = f"def known_model():\n    return Model(None, {graph})"
    sources.replace(address(evaluate.__name__, "known_model"), source, _model(module))
    source = "def new_model(graph):\n    model = Model(None, graph)\n    model.initialise()\n    return model"
    sources.replace(address(program.__name__, "new_model"), source, _model(module))
    _settle_schedule(sources, schedule, known_recipe.schedule)
    threads = "def num_threads():\n    return torch.get_num_threads()"
    sources.replace(address("pgolf_post.base.threads", "num_threads"), threads, {"torch": address("torch")})
    sources.replace(address("pgolf_post.base.progress", "progress_bar"), PROGRESS_BAR)
    if seed.run and not str(seed.run.meta.get("device", "cpu")).startswith("cpu"):  # no need of a CPU's BLAS
        sources.replace(address("pgolf_post.calibrate.products", "upper_gram"), UPPER_GRAM)

    # what the program asks for by name
    run = seed.run.meta if seed.run else {}
    asked = {
        "recipe": recipe,
        "view": seed.settings["view"],
        "reserve": float((run.get("reserve") or {}).get("seconds", 0.0)),
        "backend": _backend(module, run.get("attention", "sdpa")),
        "loops": module.config.max_active_loops,
        "calibration": calibration,
        "calibration_seq_len": calibration.seq_len or family.train_seq_len(module),
        "sites": family.sites(module),
        "packing": PackSettings(codec=seed.settings["codec"]),
        "config": dict(config),
        "lineage": dict(seed.manifest["lineage"]),
    }
    rules: tuple[Settings, ...]
    if is_fitted(seed):
        asked |= asked_by_fit(seed, module, family)
        rules = tuple(asked["choices"])
        settle_fit(sources, choices_of(seed))
    else:
        plan = plan_of(seed)
        asked |= asked_by_plan(plan, module, family, bool(seed.stats_settings().get("fisher")))
        rules = tuple(plan.rules)
        settle_plan(sources, plan)
    values = {**_of_model(module.config), **_by_class(recipe), **_by_class(calibration), **_by_class(asked["packing"])}
    for table in ("run", "data", "optim", "schedule", "checkpoint"):
        values |= _by_class(getattr(known_recipe, table))
    if asked.get("lqer") is not None:
        values |= _by_class(asked["lqer"])
    answers = {
        address(program.__name__, "known"): ByName(asked),
        address(fitting.__name__, "known"): ByName(asked),
        address("pgolf_post.base.numba", "use_compiled"): False,
        address("pgolf_post.quantize.rows", "_damping"): {},
    }
    shared = {address("pgolf_post.calibrate.collect", "Observed"): {"fisher": asked["backward"]}}
    facts = _facts(sources, module, config, protocol, values, answers, shared)
    facts = dataclasses.replace(facts, objects=rules, values={**facts.values, **_of_rules(rules)})
    return amalgamate(sources, address(program.__name__, "main"), facts, _silent(), UNUSED)


def read_recipe(config: Mapping[str, Any], path: Path, overrides: Sequence[str] = ()) -> Settings:
    """Read a recipe as the trainer of a config's family does. Raises SettingsError, NotFoundError."""
    package = type(settled_module(config)).__module__.partition(".")[0]
    recipe: Settings = importlib.import_module(f"{package}.handed_in").recipe_of(path, overrides)
    return recipe


def calibration_of(seed: Seed) -> CalibrationSettings:
    """Return the settings of the statistics that an artifact was made with."""
    kept = seed.stats_settings()
    given = {key: kept[key] for key in CalibrationSettings.model_fields if key in kept}
    return CalibrationSettings(**given)


def _of_rules(rules: Sequence[Settings]) -> dict[str, Partly]:
    """Return, under each class of rules, the settings that all rules of it that have them agree on."""
    classes = {kind for rule in rules for kind in type(rule).__mro__ if issubclass(kind, Settings)} - {Settings}
    known = {}
    for kind in classes:
        held = [rule for rule in rules if isinstance(rule, kind)]
        names = {name for rule in held for name in type(rule).model_fields}
        values = {name: [getattr(rule, name) for rule in held if hasattr(rule, name)] for name in sorted(names)}
        same = {name: own[0] for name, own in values.items() if all(repr(each) == repr(own[0]) for each in own)}
        known[_address_of(kind)] = Partly(same)
    return known


def _settle_schedule(sources: Sources, module: Any, settings: Any) -> None:
    """Replace the choice among learning-rate schedules by the chosen shape, or its points."""
    if settings.points:
        source = f"def lr_multiplier(settings, at):\n    return along({settings.points!r}, at)"
        along = {"along": _address_of(module.multiplier_along)}
        sources.replace(address(module.__name__, "lr_multiplier"), source, along)
        return
    row, peak = module.schedule_of(settings.shape), module.warmup_end(settings)
    read = {key: getattr(settings, key) for key in row.reads}
    keywords = ", ".join(f"{key}={value!r}" for key, value in read.items())
    rise = f"    if at < {peak!r}:\n        return max(at / {peak!r}, {settings.lr_floor!r})\n"
    source = f"def lr_multiplier(settings, at):\n{rise}    return shape(at, {peak!r}, {keywords})"
    sources.replace(address(module.__name__, "lr_multiplier"), source, {"shape": _address_of(row.function)})


def _backend(module: Any, name: str) -> Any:
    """Return the attention kernel that a run used; None for the model's own default."""
    own = module.attention_backend
    return None if name == own.name else vars(importlib.import_module(type(own).__module__))["BACKENDS"][name]


UPPER_GRAM = """
def upper_gram(x, dtype=torch.float32):
    return panel_gram(x.to(dtype), PANEL)
"""
PROGRESS_BAR = """
@contextmanager
def progress_bar(description, total, unit=""):
    yield lambda *_: None
"""

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


def _of_model(config: Settings) -> dict[str, Any]:
    """Return a model's config under its classes, and under the name that its parts give the whole."""
    parts = [kind.__module__ for kind in type(config).__mro__ if kind.__qualname__ == "Part"]
    return {**_by_class(config), **{address(module, "Whole"): config for module in parts}}


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


def _silent() -> list[str]:
    own = [address("pgolf_post.base.progress", "say"), address("pgolf_post.base.progress", "progress_bar")]
    own += [address("pgolf_post.score.nats", "observe")]
    own += [address("pgolf_post.pack.packable", "check_packable")]
    own += [address("pgolf_post.calibrate.text", "refuse_validation_shards")]
    own += [address("pgolf_post.fit.limits", "require_solvable"), "require_view"]
    return [*own, *SILENT, address("pgolf_post.score.ttt.gradients", "require_same_forward")]
