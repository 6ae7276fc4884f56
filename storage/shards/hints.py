"""What to do where there are no such shards: the nearest name, or the command that packs them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from storage.errors import UserError, call, did_you_mean, setting
from storage.shards.image_files import listing, tars_in

if TYPE_CHECKING:
    from collections.abc import Sequence


def nearest_hint(path: Path, tars: Sequence[str]) -> str:
    """The shard whose name is nearest to one that does not exist, of the names of the tars in its folder."""
    where = "this folder" if path.parent == Path() else path.parent
    return did_you_mean(path.name, tars) if tars else f"There are no tars in {where}."


def folder_error(path: Path) -> UserError:
    """The error for a folder that was given in place of shards: what it holds, and what to do with it."""
    if tars_in(path):
        pattern = shlex.quote(f"{path}/*.tar")
        return UserError(f"{path} is a folder of tars", hint=f"Name them: {setting('shards', pattern)}")
    images = listing(path).images
    if not images:
        return UserError(f"{path} is a folder without tars and without images; shards are tar files")
    hint = pack_hint(path, len(images))
    if all(image.parent == path for image in images):
        hint += "\n  These images have no labels: for labels, pack the folder that holds one folder per class."
    return UserError(f"{path} is a folder of {len(images)} images; shards are tar files", hint=hint)


def pack_hint(source: Path, images: int = 0) -> str:
    """The command that makes shards from a folder or a list, and what the shards are then called."""
    stem = re.sub(r"[^\w-]", "_", source.resolve().stem) or "train"
    out = names_for(stem, images)
    training, validation = setting("shards", shlex.quote(out)), setting("val", f"'{stem}-val-*.tar'")
    return (
        f"Pack it first:\n  {call('pack', str(source), out, val_fraction=0.1)}\n"
        f"  Then give {training}, and {validation} to {call('train')}."
    )


def names_for(stem: str, images: int) -> str:
    """What new shards of so many images may be called: a thousand in each."""
    last = max(0, -(-images // 1000) - 1)
    return f"{stem}-{f'{{000000..{last:06d}}}' if last else '000000'}.tar"
