"""Which method and which settings for which tensor, decided before any work and shown as a table.

Rules are matched by role, first match wins; a role that no rule covers is an error, never a silent default.
The default values are PR #1394's (openai/parameter-golf): int6 with clip k = 12.85, embedding int8 with k = 20.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from pgolf_post.errors import SettingsError
from pgolf_post.families import ModelFamily, Site
from pgolf_post.settings import Settings

Method = Literal["gptq", "rtn", "keep"]

EMBEDDING_ROLES = ("embedding", "head")
MATRIX_ROLES = ("q", "k", "v", "attn_proj", "mlp_fc", "mlp_proj", "projection")
KEPT_ROLES = ("control",)


class QuantizeSettings(Settings):
    """The knobs of `requant`."""

    bits: int = Field(6, ge=2, le=8, description="bits of the matrices' symbols")
    clip: float = Field(12.85, gt=0, description="SDClip k of the matrices: scale = k·std(row)/(2^(bits-1)-1)")
    embed_bits: int = Field(8, ge=2, le=8, description="bits of the embedding's (and head's) symbols")
    embed_clip: float = Field(20.0, gt=0, description="SDClip k of the embedding and head")
    hessian_lambda: float = Field(0.0, ge=0, le=1, description="Hessian-aware SDClip: 0 = off (PR #1412)")
    damp: float = Field(0.01, gt=0, le=1, description="damping of the Hessian, as a share of its mean diagonal")
    act_order: bool = Field(True, description="quantize columns in order of falling Hessian diagonal")
    block_size: int = Field(128, ge=1, description="columns between lazy updates of the rest")


@dataclass(frozen=True)
class TensorPlan:
    """What happens to one tensor."""

    name: str
    role: str
    method: Method
    site: str | None  # whose Hessian is used
    bits: int = 16
    clip: float = 0.0


def make_plan(
    names: Iterable[str],
    family: ModelFamily,
    sites: list[Site],
    settings: QuantizeSettings,
) -> list[TensorPlan]:
    """One row per tensor. A matrix that no site feeds (an untied embedding is only looked up) is rounded to nearest.

    Raises SettingsError naming tensors whose role has no rule.
    """
    site_of: Mapping[str, str] = {tensor: site.name for site in sites for tensor in site.tensors}
    plan, uncovered = [], []
    for name in names:
        role, site = family.role(name), site_of.get(name)
        method: Method = "gptq" if site else "rtn"
        if role in KEPT_ROLES:
            plan.append(TensorPlan(name, role, "keep", None))
        elif role in EMBEDDING_ROLES:
            plan.append(TensorPlan(name, role, method, site, settings.embed_bits, settings.embed_clip))
        elif role in MATRIX_ROLES:
            plan.append(TensorPlan(name, role, method, site, settings.bits, settings.clip))
        else:
            uncovered.append(f"{name} (role {role!r})")
    if uncovered:
        raise SettingsError("no quantization rule covers: " + ", ".join(uncovered))
    return plan
