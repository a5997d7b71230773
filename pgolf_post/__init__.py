"""pgolf-post: checkpoint-centric post-training for Parameter Golf.

    import pgolf_post as pg

    view = pg.Checkpoint.open("checkpoints/mine/step_005000-final").load()
    data = pg.DataFolder.open("data/sp1024")
    artifact = pg.fit(view, data, budget=16_000_000)
    print(artifact.num_bytes, pg.score(artifact, data).bpb)

Every name of `__all__` is imported when it is first used: `import pgolf_post` loads no torch. docs/api/index.md has a
round trip from a checkpoint to bits per byte. The command line calls the same functions.

Symbols, in code, docstrings and docs:

    W, Ŵ      a matrix (out, in), and what the artifact decodes to; E = W - Ŵ
    x, H      the input of a site, and its Hessian Σxxᵀ, a sum over calibration tokens
    δ         the gradient of the loss by a matrix's output; Σδ² is the Fisher information of its rows
    n, Δ      integer symbol and quantization step: Ŵ_ij = n_ij·Δ_ij
    k, λ      SDClip: Δ = k·std(row)/(2^(bits-1)-1); λ widens the steps of rows that carry much of Σ|W|·diag(H)
    F, ℓ      LDLᵀ factors of a Hessian, H = F·diag(ℓ²)·Fᵀ: F feeds errors forward, ℓ² are the pivots
    F_M, F_C  F of the inputs' Hessian and of the outputs', where errors are fed forward from both sides
    c         the one constant of `fit`: every weight costs c²/24 nats per token; a larger c takes fewer bytes
    κ         measured ÷ predicted loss of quantizing a tensor alone; its steps are divided by √κ
    bpb       bits per byte: nats / (ln 2 · bytes of text)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors; at run time __getattr__ imports what is asked for
    from pgolf_post.artifacts import PackedArtifact, requant
    from pgolf_post.average.linear import swa_blend
    from pgolf_post.average.posthoc import posthoc_ema as ema_blend
    from pgolf_post.average.profiles import ExponentialLength, PowerLength
    from pgolf_post.average.settings import Selection
    from pgolf_post.calibrate import CalibrationSettings, Stats, calibrate
    from pgolf_post.checkpoint import Checkpoint, View, save_checkpoint
    from pgolf_post.curves.curve import Log
    from pgolf_post.curves.reading import read_log
    from pgolf_post.data import DataFolder
    from pgolf_post.diagnose.settings import DiagnoseSettings
    from pgolf_post.diagnose.stage import Diagnosis, diagnose
    from pgolf_post.errors import PgolfError
    from pgolf_post.families import BaseFamily, Fold, Lookup, Site, load_family
    from pgolf_post.fit.artifact import fit
    from pgolf_post.fit.settings import FitSettings
    from pgolf_post.pack.artifact import DecodedArtifact, read_artifact, unpack
    from pgolf_post.pack.container import PackSettings, pack
    from pgolf_post.pack.report.size import SizeReport
    from pgolf_post.pack.report.size import count as size
    from pgolf_post.plan import Plan, read_plan
    from pgolf_post.quantize.model import quantize_view as quantize
    from pgolf_post.quantize.tensor import QuantizedModel, QuantizedTensor
    from pgolf_post.score.audit.stage import Audit, audit
    from pgolf_post.score.bpb import Score
    from pgolf_post.score.compare.comparison import Comparison, compare
    from pgolf_post.score.plain import PlainProtocol
    from pgolf_post.score.sliding import SlidingProtocol
    from pgolf_post.score.stage import StoredScore, score

_HOME = {  # name → "module:name", or "" for a package that is called (base/callable_package.py)
    # nouns, from a run to a score
    "Checkpoint": "checkpoint:Checkpoint",
    "View": "checkpoint:View",
    "DataFolder": "data:DataFolder",
    "Stats": "calibrate.stats:Stats",
    "Plan": "plan:Plan",
    "QuantizedModel": "quantize.tensor:QuantizedModel",
    "QuantizedTensor": "quantize.tensor:QuantizedTensor",
    "PackedArtifact": "artifacts:PackedArtifact",
    "DecodedArtifact": "pack.artifact:DecodedArtifact",
    "SizeReport": "pack.report.size:SizeReport",
    "StoredScore": "score.stage:StoredScore",
    "Score": "score.bpb:Score",
    "Comparison": "score.compare.comparison:Comparison",
    "Audit": "score.audit.stage:Audit",
    "Diagnosis": "diagnose.stage:Diagnosis",
    "Log": "curves.curve:Log",
    "PgolfError": "errors:PgolfError",
    # verbs, in pipeline order
    "save_checkpoint": "checkpoint:save_checkpoint",
    "swa_blend": "average.linear:swa_blend",
    "ema_blend": "average.posthoc:posthoc_ema",
    "diagnose": "",
    "read_log": "curves.reading:read_log",
    "calibrate": "",
    "read_plan": "plan:read_plan",
    "quantize": "",
    "pack": "",
    "unpack": "pack.artifact:unpack",
    "read_artifact": "pack.artifact:read_artifact",
    "requant": "artifacts:requant",
    "fit": "",
    "size": "pack.report.size:count",
    "score": "",
    "compare": "score.compare.comparison:compare",
    "audit": "score.audit.stage:audit",
    # settings
    "CalibrationSettings": "calibrate.settings:CalibrationSettings",
    "DiagnoseSettings": "diagnose.settings:DiagnoseSettings",
    "Selection": "average.settings:Selection",
    "PowerLength": "average.profiles:PowerLength",
    "ExponentialLength": "average.profiles:ExponentialLength",
    "FitSettings": "fit.settings:FitSettings",
    "PackSettings": "pack.container:PackSettings",
    "PlainProtocol": "score.plain:PlainProtocol",
    "SlidingProtocol": "score.sliding:SlidingProtocol",
    # a model of your own
    "BaseFamily": "families:BaseFamily",
    "Site": "families:Site",
    "Lookup": "families:Lookup",
    "Fold": "families:Fold",
    "load_family": "families:load_family",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """Import a name of `__all__` when it is first used (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'pgolf_post' has no attribute {name!r}; it has {', '.join(_HOME)}")
    module, _, attribute = _HOME[name].partition(":")
    value = importlib.import_module(f"pgolf_post.{module or name}")
    if attribute:
        value = getattr(value, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
