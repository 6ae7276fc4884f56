"""`init`: a look at a folder, and a project file for what lies in it, with a word on every choice."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shlex
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from storage.errors import UserError
from storage.shards.classes import classes_of
from storage.shards.image_folder import class_folders, folders_in, shards_in
from storage.shards.tar import IMAGES, counted_flaws
from storage.views.render import BadImage, decode, size_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from storage.progress import Progress

T = TypeVar("T")
LOOKED_AT = 200  # images, spread over the folder, whose sizes are read
PER_SHARD = 1000  # samples
VIEWS = 4
HELD_BACK = r"(^|[-_.])(val|valid|validation|test)([-_.]|\d|$)"  # in the names of validation shards
PASSES = 400_000  # images that a student sees in all, where nobody says it: an hour or less for small ones


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSummary:
    """What lies in a folder.

    Attributes:
        images: their number; about, where some shards are estimated.
        classes: their names; empty where nobody says them.
        side: the median of the shorter sides that were read, in pixels.
        shards: training tars, or the names that `pack` will give them.
        val: validation tars, likewise.
        why: these are the ones for validation.
        packed: whether the shards are there.
        estimated: how many shards were not read, their samples estimated by their sizes.
    """

    images: int
    classes: list[str]
    side: int
    shards: list[str]
    val: list[str]
    why: str
    packed: bool
    estimated: int = 0


def look(folder: Path, home: Path, progress: Progress) -> ImageSummary:
    """What lies in a folder: shards, or images in one folder a class.

    Args:
        folder: to look at.
        home: where the project file will lie, and new shards in `shards` beside it.
        progress: for people.

    Raises:
        UserError: neither, or shards that leave none for training or validation.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one with shards (.tar), or with one folder of images a class")
    tars, odd = shards_in(folder)
    if not tars:
        return _images(folder, progress)
    for line in odd:
        progress.say(f"skipped: {line}")
    return _shards(folder, [Path(tar) for tar in tars], home, progress)


def _images(folder: Path, progress: Progress) -> ImageSummary:
    folders = folders_in(folder)
    files, classes, odd = class_folders(folder, progress.say) if folders else ([], [], [])
    if len(classes) < 2:
        one = f" ({classes[0]} is one class alone)" if classes else ""
        raise UserError(
            f"{folder}: neither shards nor images in class folders{one}; expected tars, or {folder}/CLASS/IMAGE."
            f"{{{','.join(IMAGES)}}} for two classes or more"
        )
    for line in odd:
        progress.say(f"skipped: {line}")
    step = max(1, len(files) // LOOKED_AT)
    broken = f"{folder}: none of the images that were looked at can be opened, such as {files[0][0]}"
    side = _side((path for path, _, _ in files[::step]), size_in, broken)
    count = max(1, round(0.9 * len(files) / PER_SHARD))
    names = "shards/train-000000.tar" if count == 1 else f"shards/train-{{000000..{count - 1:06d}}}.tar"
    return ImageSummary(
        images=len(files),
        classes=classes,
        side=side,
        shards=[names],
        val=["shards/train-val-*.tar"],
        why="`pipeline pack` cuts them off",
        packed=False,
    )


def _shards(folder: Path, tars: Sequence[Path], home: Path, progress: Progress) -> ImageSummary:
    from precompute.plan import counted

    val = [path for path in tars if re.search(HELD_BACK, path.stem, re.IGNORECASE)]
    train = [path for path in tars if path not in val]
    why = "their names say val, valid, validation or test"
    if not val:
        val, train = train[-1:], train[:-1]
        why = "the last one, as no name says val, valid, validation or test"
    if not train:
        what = "training" if len(val) > 1 else "validation"
        raise UserError(
            f"{folder}: {len(tars)} shard(s) leave none for {what}; cut some off: "
            f"pipeline pack {shlex.quote(str(folder))} 'shards/train-{{000000..000009}}.tar' --val-fraction 0.1"
        )
    shards = counted(None, [str(path) for path in (*train, *val)], progress, skip=True)
    for shard in shards:
        if shard.opened is not None and (flaws := shard.opened.index.left_out):
            progress.say(f"{shard.url}: {counted_flaws(flaws)}: skipped by precompute --on-decode-error skip")
    first = next(shard.opened for shard in shards if shard.opened is not None)  # some are always read
    images = (sample.image for sample in first.read(range(min(64, len(first)))))
    side = _side(images, lambda image: decode(image).size, f"{first.url}: none of its first images can be decoded")
    return ImageSummary(
        images=sum(shard.samples for shard in shards),
        classes=list(classes_of([str(path) for path in train]) or []),
        side=side,
        shards=[os.path.relpath(path, home) for path in train],
        val=[os.path.relpath(path, home) for path in val],
        why=why,
        packed=True,
        estimated=sum(shard.estimated for shard in shards),
    )


def _side(images: Iterable[T], size: Callable[[T], tuple[int, int]], broken: str) -> int:
    """The median of the images' shorter sides, of those that can be read. Raises UserError: none can."""
    sides = []
    for image in images:
        with contextlib.suppress(BadImage):  # `pack` and `precompute` name what is broken
            sides.append(min(size(image)))
    if not sides:
        raise UserError(broken)
    return round(statistics.median(sides))


def sizes(side: int) -> tuple[int, int]:
    """View size and patch size for images of some size: a grid of 8 to 14 patches a side."""
    for largest, chosen in ((48, (32, 4)), (96, (64, 8)), (160, (128, 16))):
        if side <= largest:
            return chosen
    return 224, 16


def text(summary: ImageSummary) -> str:
    """The project file."""
    view, patch = sizes(summary.side)
    epochs = max(20, min(200, round(PASSES / max(1, summary.images))))
    batch = 128 if summary.images < 100_000 else 512
    small = "\n  embed_dim: 128\n  depth: 6\n  num_heads: 4" if view <= 64 else ""

    def listed(names: Sequence[str]) -> str:
        quoted = [yaml.safe_dump(name, width=math.inf).removesuffix("...\n").strip() for name in names]
        return quoted[0] if len(names) == 1 else "\n" + "\n".join(f"  - {name}" for name in quoted)

    count = len(summary.classes)
    unknown = "\n  # num_classes: 10   # no classes.json lies beside the shards: say how many classes there are"
    mark = "" if count else "# "
    images = f"{'about ' if summary.estimated else ''}{summary.images:,} images"
    return f"""\
# {images}, {count or "unnamed"} classes, about {summary.side} pixels on the shorter side.
# Flags override this file. All settings: docs/recipes.md; teachers: pipeline teachers; recipes: pipeline recipes.

shards: {listed(summary.shards)}
# For validation: {summary.why}.
val: {listed(summary.val)}
store: store            # what the teachers saw; any number of students learn from it

views:                  # drawn once, stored, and replayed for every student
  policy: deit          # crops, flips, colors, erasing, mixing; light: crops and flips
  size: {view}
  count: {VIEWS}              # more views cost more space and generalize better: pipeline plan tells both

teachers:               # several may stand here; each takes its time and space once
  vit_tiny:             # a ViT with ImageNet's weights, from timm's hub; `pipeline teachers` lists others
    # weights: FILE.safetensors      # offline
    targets: [embedding, class_row]  # for fit-teacher, and for the recipe advit-l1
  {mark}ours:                 # the same with a head for these classes: what fit-teacher writes, for deit-hard
  {mark}  teacher: vit_tiny
  {mark}  weights: ours.safetensors
  {mark}  args: {{num_classes: {count or 10}}}
  {mark}  targets: logits
  # mobilenetv2:        # a CNN's activation maps, for the recipe aal
  #   targets: activations

student:
  model: vit_tiny_patch16_224
  img_size: {view}
  patch_size: {patch}         # {view // patch}x{view // patch} patches{small}{"" if count else unknown}

set:                    # over every recipe
  optim.epochs: {epochs}     # more are better, and take as many times longer
  optim.warmup_epochs: 5
  optim.lr: 0.001
  stream.batch_size: {batch}
  model_ema_decay: null  # averaged weights, as some recipes keep them, are for runs of many thousand steps
"""


def init(folder: Path, out: Path, progress: Progress) -> dict[str, Any]:
    """Look, and write the file; what was found, as plain data.

    Raises:
        UserError: as `look`; a file that is there already.
    """
    if out.exists():
        raise UserError(f"{out}: is there already; give another name with --out, or remove it")
    summary = look(folder.expanduser(), out.parent, progress)
    out.write_text(text(summary), encoding="utf-8")
    project = [] if out.name == "pipeline.yaml" and out.parent == Path() else ["--project", str(out)]
    scratch = ["train", "--recipe", "scratch", "--out", "scratch"]
    words = [["plan"], ["precompute"], scratch]
    if summary.classes:
        fitted = str(out.parent / "ours.safetensors")
        words = [
            ["plan", "--teacher", "vit_tiny"],
            ["precompute", "--teacher", "vit_tiny"],
            ["fit-teacher", "--teacher", "vit_tiny", "--out", fitted],
            ["precompute", "--teacher", "ours"],
            scratch,
            ["train", "--recipe", "deit-hard", "--out", "taught"],
        ]
    words = [[*command, *project] for command in words]
    if not summary.packed:
        where = [str(out.parent / summary.shards[0]), "--val-fraction", "0.1"] if project else []
        words = [["pack", str(folder), *where], *words]
    return {
        "project": str(out),
        **{name: getattr(summary, name) for name in ("images", "estimated", "classes", "side", "val")},
        "val_because": summary.why,
        "commands": [shlex.join(["pipeline", *command]) for command in words],
    }
