"""Settings: nothing passes silently; what is wrong is named with its key, its value and its limit."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import hypothesis.strategies as st
import pytest
from hypothesis import given
from pydantic import Field, ValidationError

from pgolf_post.errors import NotFoundError, SettingsError
from pgolf_post.rules import GptqRule
from pgolf_post.settings import Settings, apply_override, canonical_json, parse_settings, read_settings
from trainer.config import DataSettings, Recipe
from trainer.optim.settings import OptimSettings


class Inner(Settings):
    rate: float = Field(0.5, gt=0, le=1)
    kind: Literal["plain", "fancy"] = "plain"
    label: str = "none"


class Outer(Settings):
    count: int = Field(ge=1)
    inner: Inner = Inner()
    sizes: tuple[int, ...] = ()
    path: Path | None = None


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=12,
)


def refusal(cls: type[Settings], tree: Mapping[str, Any]) -> str:
    with pytest.raises(SettingsError) as caught:
        parse_settings(cls, tree, "recipe.toml")
    assert caught.value.exit_code == 2
    return str(caught.value)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_an_unknown_key_is_named_with_the_close_one_and_all_valid_ones() -> None:
    message = refusal(Outer, {"count": 1, "inner": {"rat": 0.1}})
    assert message == (
        "recipe.toml: unknown key 'inner.rat' (did you mean 'rate'?); valid keys here: kind, label, rate"
    )
    assert refusal(Outer, {"count": 1, "zzz": 0}) == (
        "recipe.toml: unknown key 'zzz'; valid keys here: count, inner, path, sizes"
    )


def test_a_misspelt_recipe_key_is_named_with_the_close_one(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('[run]\nname = "x"\n[optim]\nmatrix_lrr = 0.02\n')
    with pytest.raises(
        SettingsError, match=r"unknown key 'optim\.matrix_lrr' \(did you mean 'matrix_lr'\?\)"
    ) as caught:
        read_settings(path, Recipe)
    assert all(f"key {table!r} is required" in str(caught.value) for table in ("data", "model", "schedule"))
    listed = str(caught.value).partition("valid keys here: ")[2].partition(";")[0].split(", ")
    assert listed == sorted(OptimSettings.model_fields)


@pytest.mark.parametrize(
    ("tree", "parts"),
    [
        ({"bits": 9}, ("bits", "9", "8")),
        ({"bits": 1}, ("bits", "1", "2")),
        ({"hessian_lambda": 1.5}, ("hessian_lambda", "1.5", "1")),
        ({"hessian_lambda": -0.1}, ("hessian_lambda", "-0.1", "0")),
        ({"clip": 0.0}, ("clip", "0.0", "greater than 0")),
        ({"clip": math.nan}, ("clip", "nan", "finite")),
        ({"clip": math.inf}, ("clip", "inf", "finite")),
        ({"clip": "wide"}, ("clip", "'wide'", "number")),
        ({"bits": 5.5}, ("bits", "5.5", "integer")),
    ],
)
def test_a_value_out_of_range_is_named_with_its_key_and_its_limit(tree: dict[str, Any], parts: tuple[str, ...]) -> None:
    message = refusal(GptqRule, {"name": "matrices", "method": "gptq", **tree})
    assert [part for part in parts if part not in message] == []


def test_all_problems_are_listed_at_once() -> None:
    message = refusal(Outer, {"inner": {"rate": 2, "kind": "odd", "typo": 1}, "sizes": [1, "x"]})
    for part in ("'count' is required", "inner.rate = 2", "inner.kind = 'odd'", "'inner.typo'", "sizes.1 = 'x'"):
        assert part in message


def test_rules_across_keys_are_explained_with_their_values() -> None:
    data = {"dir": "data", "seq_len": 16, "batch_tokens": 65}
    message = refusal(DataSettings, data)
    assert "batch_tokens 65 must be a multiple of micro_batch_tokens 65" in message
    assert "multiple of seq_len 16" in message


def test_a_rule_across_keys_does_not_print_the_table_that_it_is_about() -> None:
    with pytest.raises(SettingsError) as caught:
        parse_settings(OptimSettings, {"ema_decay": 0.0, "ema_every": 2}, "recipe")
    assert str(caught.value).startswith("recipe: ema_every 2 acts only with ema_decay above 0")
    assert "{" not in str(caught.value)


@pytest.mark.parametrize("key", ["matrix_lr", "embed_lr", "head_lr", "scalar_lr"])
def test_a_learning_rate_that_float32_does_not_hold_is_refused(key: str) -> None:
    with pytest.raises(SettingsError, match=rf"{key} = 1e\+300: .*less than or equal to 1000000"):
        parse_settings(OptimSettings, {key: 1e300}, "recipe")


def test_settings_cannot_be_changed_after_they_are_made() -> None:
    settings = parse_settings(Outer, {"count": 1}, "here")
    with pytest.raises(ValidationError, match="frozen"):
        settings.count = 2  # type: ignore[misc]


# ---- files and overrides ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contents", [b"count = ", b"[a", b"\xff", b"count = 1\ncount = 2"])
def test_a_file_that_is_not_toml_is_named(tmp_path: Path, contents: bytes) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(contents)
    with pytest.raises(SettingsError, match=r"recipe\.toml is not valid TOML"):
        read_settings(path, Outer)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no such settings file: .*absent\.toml"):
        read_settings(tmp_path / "absent.toml", Outer)


def test_overrides_win_over_the_file_and_the_last_one_over_the_others(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("count = 1\nsizes = [1]\n[inner]\nrate = 0.25\n")
    overrides = ["count=2", "inner.kind=fancy", "inner.label = 'a b'", "sizes=[3, 4]", "path=data/x", "count = 7"]
    assert read_settings(path, Outer, overrides) == Outer(
        count=7, inner=Inner(rate=0.25, kind="fancy", label="a b"), sizes=(3, 4), path=Path("data/x")
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("3e-4", 3e-4),
        ("true", True),
        ('"3"', "3"),
        ("[0.7, 0.85]", [0.7, 0.85]),
        ("{ b = 1 }", {"b": 1}),
        ("bare words", "bare words"),
        (" padded ", "padded"),
        ("a=b", "a=b"),
        ("007", "007"),
        ("True", "True"),
        ("", ""),
        ("1\nother = 2", 1),
    ],
)
def test_an_override_is_read_as_toml_or_else_as_a_bare_string(text: str, value: object) -> None:
    tree: dict[str, Any] = {"a": {"kept": 0}}
    apply_override(tree, f"a.deep.key={text}")
    assert tree == {"a": {"kept": 0, "deep": {"key": value}}}
    assert type(tree["a"]["deep"]["key"]) is type(value)


@pytest.mark.parametrize("override", ["", "key", "=3", " = 3", "inner.rate", ".count=1", "inner.=1", "inner..rate=1"])
def test_an_override_without_key_or_value_is_refused_with_an_example(override: str) -> None:
    with pytest.raises(SettingsError, match="expected key=value, for example"):
        apply_override({}, override)


def test_an_override_through_a_value_is_refused_and_names_it() -> None:
    with pytest.raises(SettingsError, match="'rate' is a value, not a table"):
        apply_override({"inner": {"rate": 1}}, "inner.rate.x=2")


@pytest.mark.parametrize(("override", "named"), [("inner.rat=1", "'inner.rat'"), ("inner.rate=3", "inner.rate = 3")])
def test_an_override_is_as_strict_as_the_file(tmp_path: Path, override: str, named: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("count = 1\n")
    with pytest.raises(SettingsError) as caught:
        read_settings(path, Outer, [override])
    assert named in str(caught.value)


# ---- canonical JSON --------------------------------------------------------------------------------------------------


def shuffled(value: Any, order: random.Random) -> Any:
    """An equal value whose dicts were filled in another order."""
    if isinstance(value, dict):
        keys = list(value)
        order.shuffle(keys)
        return {key: shuffled(value[key], order) for key in keys}
    return [shuffled(item, order) for item in value] if isinstance(value, list) else value


@given(JSON_VALUES, st.randoms(use_true_random=False))
def test_canonical_json_does_not_depend_on_the_order_of_keys(value: Any, order: random.Random) -> None:
    assert canonical_json(shuffled(value, order)) == canonical_json(value)


@given(JSON_VALUES, JSON_VALUES)
def test_canonical_json_keeps_the_value_and_tells_values_apart(value: Any, other: Any) -> None:
    contents = canonical_json(value)
    assert json.loads(contents) == value
    assert contents.isascii()
    assert (canonical_json(other) == contents) == (repr(shuffle_free(other)) == repr(shuffle_free(value)))


def shuffle_free(value: Any) -> Any:
    """The value with its dicts in sorted order, so that repr tells 1 from 1.0 and True."""
    if isinstance(value, dict):
        return {key: shuffle_free(value[key]) for key in sorted(value)}
    return [shuffle_free(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_canonical_json_refuses_what_json_cannot_say(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"a": [value]})
