"""Settings under the names that earlier versions gave them.

What runs recorded (checkpoints, results, students' files) is read under today's names. What a user writes is not: an
old name there is an unknown setting, and the error says today's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_HEADS = {"temperature": "head_temperature"}
# section of a recipe, where a loss stands by its type -> setting before -> setting today
_SETTINGS = {
    "": {"copying": "attention_copy", "ema": "model_ema_decay", "speed": "precision"},
    "attention_copy": {"what": "tensors", **_HEADS},
    "losses.aal": {"loss": "distance"},
    "losses.aal.links": {"normalise": "normalize"},
    "losses.advit": {"tau": "temperature", **_HEADS},
    "losses.alignment": {"loss": "distance"},
    "losses.attention": {"what": "tensors", **_HEADS},
    "losses.compress": {"tau": "temperature"},
    "losses.deit": {"kind": "distillation_type", "reduce": "reduction", "tau": "temperature"},
    "losses.features": _HEADS,
    "losses.guidance": {"loss": "distance", **_HEADS},
    "losses.head_specific": {"loss": "distance", **_HEADS},
    "losses.seed": {"tau_student": "student_temperature", "tau_teacher": "teacher_temperature"},
    "optim": {"accumulate": "grad_accum_steps", "betas": "opt_betas"},
    "precision": {"amp": "amp_dtype", "attention": "fused_attn", "compile": "torchcompile"},
    "stream": {"window": "shuffle_blocks"},
}
# setting today -> value before -> value today
_VALUES: dict[str, dict[str, Any]] = {
    "losses.deit.reduction": {"numel": "mean", "batch": "batchmean"},
    "precision.fused_attn": {"fused": True, "unfused": False},
}


def renamed(section: str) -> dict[str, str]:
    """Setting before -> setting today, of a section of a recipe: `optim`, or `losses.aal` for any loss of this type."""
    is_loss = section.startswith("losses.") and section.count(".") == 1
    return {**({"method": "type"} if is_loss else {}), **_SETTINGS.get(section, {})}


def upgraded(settings: Any, section: str = "") -> Any:
    """A section of a recipe, by default the whole, under today's names; what has these already is left as it is."""
    if not isinstance(settings, Mapping):
        return settings
    names = renamed(section)
    if not names.keys() - names.values() & settings.keys():  # all its names are today's
        names = {}
    result = {}
    for name, value in settings.items():
        today = names.get(name, name)
        is_loss = section == "losses" and isinstance(value, Mapping)
        path = f"{section}.{value.get('method', value.get('type')) if is_loss else today}".lstrip(".")
        result[today] = _VALUES.get(path, {}).get(value, value) if isinstance(value, str) else upgraded(value, path)
    return result


def upgraded_run(record: Any) -> Any:
    """A checkpoint's content, or a run's result, under today's names; tensors are left as they are."""
    if not isinstance(record, Mapping):
        return record
    result = {{"speed": "precision", "copying": "attention_copy"}.get(name, name): v for name, v in record.items()}
    result |= {"recipe": upgraded(result["recipe"])} if "recipe" in result else {}
    result |= {"precision": upgraded(result["precision"], "precision")} if "precision" in result else {}
    result |= {"identity": upgraded_run(result["identity"])} if "identity" in result else {}
    if isinstance(sums := result.get("sums"), Mapping):
        result["sums"] = {str(name).replace("notes/", "metrics/", 1): value for name, value in sums.items()}
    if isinstance(targets := result.get("targets"), Mapping):
        result["targets"] = {"attention_copy" if name == "copying" else name: ids for name, ids in targets.items()}
    return result
