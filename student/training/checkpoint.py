"""Checkpoints: one file with everything that a resumed run needs, whole even if the run is killed at any moment.

It holds only tensors and plain data, and is read with `weights_only=True`: a hostile file runs no code.
"""

from __future__ import annotations

import os
import zipfile
from typing import TYPE_CHECKING, Any

import torch

from storage.errors import IdentityError, UserError, call, first_line, setting
from storage.objects.atomic import atomic_write
from storage.objects.checkpoint_file import refused_in
from storage.objects.network_names import key_of
from storage.objects.record_schema import Schema, Size, Three, checked
from storage.unicode_names import normalized
from student.distributed import all_gather_objects
from student.recipe.validate import validate
from student.upgrade import upgraded_run

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from student.recipe.schema import Recipe

FORMAT = 2
_DICTS = ("recipe", "identity", "precision", "sums", "scores", "student", "losses", "optimizer", "scaler")
_COUNTS = ("format", "epoch", "step", "log_bytes")
_PARTS = {**dict.fromkeys(_DICTS, dict), **dict.fromkeys(_COUNTS, int), "seconds": float, "rng": list}
# What may differ when a run is resumed: none of it changes what is computed.
FREE = ("stream.workers", "stream.memory", "checkpoint_interval", "val_interval", "tensorboard")


class IdentityRecord(Schema):
    """Fields of a checkpoint's `identity` that a resumed run reads."""

    mean: Three
    std: Three
    views: Size | None


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint under a temporary name, sync and rename it: the file is always the old or the new one."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        torch.save({"format": FORMAT, **content}, file)
        file.flush()
        os.fsync(file.fileno())
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU.

    Raises:
        UserError: no such file, or it is damaged, of another kind, or holds more than plain data.
    """
    resume, out = setting("resume", True), setting("out", "RUN")
    hint = f"Begin again in a new folder: run the same command without {resume} and with another {out}"
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes checksums and does not compare them
            broken = archive.testzip()
        if broken is not None:
            raise UserError(f"{path}: damaged: the checksum of {broken} in it does not agree", hint=hint)
        content = upgraded_run(torch.load(path, map_location="cpu", weights_only=True))
    except UserError:
        raise
    except FileNotFoundError:
        hint = f"Without {resume} a new run begins{f' in a new folder: {out}' if path.parent.exists() else ''}"
        raise UserError(f"{path.parent}: no checkpoint here to resume from", hint=hint) from None
    except Exception as error:  # torch and zipfile raise many kinds
        refused = refused_in(path, error)
        why = f"it is a pickle with more than plain data in it: {refused}" if refused else first_line(error)
        raise UserError(f"{path}: damaged, or not a checkpoint: {why}", hint=hint) from None
    missing = ["everything"]
    if isinstance(content, dict):
        missing = [name for name, kind in _PARTS.items() if not isinstance(content.get(name), kind)]
    if missing:
        message = f"{path}: not a checkpoint that {call('train')} wrote: {', '.join(missing)} is missing"
        raise UserError(message, hint=hint)
    if content["format"] != FORMAT:
        raise IdentityError(str(path), "format", FORMAT, content["format"], "Another version of the trainer wrote it.")
    checked(IdentityRecord, content["identity"], str(path), hint)
    return dict(content)


def require_same(path: Path, saved: Mapping[str, Any], recipe: Recipe, identity: Mapping[str, Any] | None) -> None:
    """Require that a resumed run has the settings that its checkpoint was trained with.

    Args:
        path: of the checkpoint.
        saved: its content.
        recipe: of the resumed run.
        identity: shards, bank, targets and views of the resumed run; None compares the recipes alone.

    Raises:
        IdentityError: with the field, what the checkpoint has and what is asked for.
    """
    trained = validate(saved["recipe"], str(path)).model_dump(mode="json")  # with defaults of newer settings
    was, now = _flat(trained), _flat(recipe.model_dump(mode="json"))
    for fields in (was, now):  # where the file of a student's function lies is nothing
        fields["student.model"] = key_of(fields["student.model"])
    if identity is not None:
        was |= _flat(saved["identity"])
        now |= _flat(dict(identity))
    for field in {**was, **now}:
        before, asked = was.get(field), now.get(field)
        if field not in FREE and before != asked:
            hint = f"A run is resumed as it began. For anything else begin a new one: {setting('out', 'RUN')}"
            raise IdentityError(str(path), field, before, asked, hint, ("the run has", "asked for"))


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    """`path.to.field` -> value; names in lists, such as classes, in NFC."""
    if not isinstance(content, dict) or not content:
        if isinstance(content, list | tuple):
            return {prefix: [normalized(item) if isinstance(item, str) else item for item in content]}
        return {prefix: content}
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def random_states(device: torch.device) -> list[dict[str, Any]]:
    """The states of the generators that training draws from, of each rank; all ranks call it."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return all_gather_objects(state)


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Restore the generators; one that was not saved, because the run was on another device, keeps its state."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
