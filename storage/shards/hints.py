"""What to do where the shards that were asked for do not lie: the nearest name, or the command that packs them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from storage.errors import did_you_mean
from storage.shards.image_files import listing, tars_in


def there_are(path: Path, tars: Sequence[str]) -> str:
    """Which shard lies there in place of one that does not, of the names of the tars in its folder."""
    where = "this folder" if path.parent == Path() else path.parent
    return did_you_mean(path.name, tars) if tars else f"There are no tars in {where}."


def folder_hint(path: Path) -> str:
    """What a folder holds that was given in place of shards, and what to do with it."""
    if tars_in(path):
        return f"{path} is a folder of tars; name them: --shards {shlex.quote(f'{path}/*.tar')}"
    images = listing(path).images
    if count := sum(image.parent != path for image in images):
        return f"{path} is a folder of class folders ({count} images); shards are tar files. {pack_hint(path, count)}"
    if images:
        return (
            f"{path} is a folder of images; shards are tar files, made of one folder a class. Pack the folder that "
            f"holds the class folders, such as\n  pipeline pack {shlex.quote(str(path.parent))} train-000000.tar"
        )
    return f"{path} is a folder, with neither tars nor class folders of images in it; shards are tar files"


def pack_hint(source: Path, images: int = 0) -> str:
    """The commands that make shards of a folder or a list, and what they are then called."""
    stem = re.sub(r"[^\w-]", "_", source.resolve().stem) or "train"
    out = shlex.quote(names_for(stem, images))
    return (
        f"Pack it first:\n  pipeline pack {shlex.quote(str(source))} {out} --val-fraction 0.1\n"
        f"  and then give --shards {out} (and to train --val '{stem}-val-*.tar')"
    )


def names_for(stem: str, images: int) -> str:
    """What new shards of so many images may be called: a thousand in each."""
    last = max(0, -(-images // 1000) - 1)
    return f"{stem}-{f'{{000000..{last:06d}}}' if last else '000000'}.tar"
