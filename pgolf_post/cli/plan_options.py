"""Options that choose a plan: a preset or file, changed value by value, and short flags for the values changed most."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from pgolf_post.errors import SettingsError
from pgolf_post.presets import DEFAULT_PRESET, preset_names

if TYPE_CHECKING:
    from pgolf_post.plan import Plan

F = TypeVar("F", bound=Callable[..., Any])


class Values(click.ParamType):
    """One value, or several with commas between them: a list then, for a command that makes several trials."""

    def __init__(self, kind: type) -> None:
        self.kind, self.name = kind, {int: "integer", float: "float"}[kind]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Any]:
        try:
            return value if isinstance(value, list) else [self.kind(part) for part in value.split(",")]
        except ValueError:
            self.fail(f"{value!r} is not {self.name}s with commas between them", param, ctx)


class Shorthand(NamedTuple):
    """A flag for one value of a rule (or of all rules that have it)."""

    flag: str
    target: str  # as in --set
    type: Any
    help: str


SHORTHANDS = {
    "bits": Shorthand("--bits", "matrices.bits", Values(int), "Bits of the matrices' symbols."),
    "clip": Shorthand(
        "--clip", "matrices.clip", Values(float), "SDClip k of the matrices, in standard deviations of a row."
    ),
    "embed_bits": Shorthand(
        "--embed-bits", "embedding.bits", Values(int), "Bits of the embedding's (and head's) symbols."
    ),
    "embed_clip": Shorthand(
        "--embed-clip",
        "embedding.clip",
        Values(float),
        "SDClip k of the embedding and head, in standard deviations of a row.",
    ),
    "hessian_lambda": Shorthand(
        "--lambda", "*.hessian_lambda", Values(float), "Strength λ of Hessian-aware SDClip; 0 turns it off (PR #1412)."
    ),
    "damp": Shorthand("--damp", "*.damp", Values(float), "Damping of Hessians, as a share of their mean diagonal."),
    "act_order": Shorthand(
        "--act-order/--no-act-order", "*.act_order", None, "Quantize columns by falling Hessian diagonal."
    ),
    "sequential": Shorthand(
        "--sequential/--no-sequential",
        "sequential",
        None,
        "Collect a block's Hessians under the quantized blocks before it.",
    ),
    "distill": Shorthand(
        "--distill/--no-distill", "distill", None, "Tune the floats that are kept, after rounding, on calibration text."
    ),
    "block_size": Shorthand(
        "--block-size", "*.block_size", Values(int), "Columns that GPTQ quantizes between lazy updates."
    ),
}


def plan_options(function: F) -> F:
    """Add --plan, --set and the shorthands; the command receives them as keyword arguments for `chosen_plan`."""
    for key, short in reversed(SHORTHANDS.items()):
        function = click.option(short.flag, key, type=short.type, default=None, help=short.help)(function)
    change = "Change a value of the plan: RULE.KEY=VALUE, or *.KEY=VALUE for every rule that has it. Repeatable."
    function = click.option("--set", "overrides", multiple=True, metavar="RULE.KEY=VALUE", help=change)(function)
    return click.option(
        "--plan",
        "plan_source",
        default=DEFAULT_PRESET,
        show_default=True,
        help=f"The plan: {', '.join(preset_names())}, or a TOML file.",
    )(function)


def chosen_plan(plan_source: str, overrides: tuple[str, ...], **options: Any) -> Plan:
    """Return the plan that the options describe. Raises SettingsError naming the flag that does not fit the plan."""
    several = [SHORTHANDS[key].flag for key, value in options.items() if isinstance(value, list) and len(value) > 1]
    if several:
        raise SettingsError(
            f"{several[0]} has several values; this command makes one trial",
            hint="pgolf-post requant makes a trial of each",
        )
    [(_, plan)] = chosen_plans(plan_source, overrides, **options)
    return plan


def chosen_plans(plan_source: str, overrides: tuple[str, ...], **options: Any) -> list[tuple[str, Plan]]:
    """Return a named plan for every combination of values that the flags give; the first is the control.

    Raises SettingsError as `chosen_plan` does.
    """
    from pgolf_post.plan import read_plan

    given = {key: _as_list(options[key]) for key in SHORTHANDS if options.get(key) is not None}
    plans = []
    for values in product(*given.values()):
        chosen = dict(zip(given, values, strict=True))
        changes = [_change(key, value) for key, value in chosen.items() if key != "distill"]
        varied = [f"{SHORTHANDS[key].flag} {value}" for key, value in chosen.items() if len(given[key]) > 1]
        try:
            plan = read_plan(plan_source, [*changes, *overrides])
        except SettingsError as error:
            if changes and plan_source != DEFAULT_PRESET and "has no rule" in str(error):
                raise SettingsError(
                    f"{error}; short flags such as --clip mean the rules of {DEFAULT_PRESET}",
                    hint=f"address this plan's own rules with --set, or leave out --plan {plan_source}",
                ) from None
            raise
        plans.append((" ".join(varied), _with_distill(plan, options.get("distill"))))
    return plans


def _change(key: str, value: object) -> str:
    """Return a shorthand's value as `--set` would have it."""
    return f"{SHORTHANDS[key].target}={str(value).lower()}"


def _with_distill(plan: Plan, wanted: bool | None) -> Plan:
    """Return the plan with its own [distill] table or the usual one, or without."""
    from pgolf_post.plan import DistillSettings

    if wanted is None:
        return plan
    return plan.model_copy(update={"distill": (plan.distill or DistillSettings()) if wanted else None})


def _as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]
