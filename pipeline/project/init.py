"""`init`: a look at a folder, and a project file for what lies in it, with a word on every choice."""

from __future__ import annotations

import math
import os
import re
import shlex
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from storage.errors import UserError
from storage.shards.classes import classes_of
from storage.shards.image_folder import class_folders, folders_in, shards_in
from storage.shards.tar import IMAGES, counted_flaws
from storage.views.render import BadImage, decode, size_in

if TYPE_CHECKING:
    from collections.abc import Sequence

    from storage.progress import Progress

LOOKED_AT = 200  # images, spread over the folder, whose sizes are read
PER_SHARD = 1000  # samples
VIEWS = 4
HELD_BACK = r"(^|[-_.])(val|valid|validation|test)([-_.]|\d|$)"  # in the names of validation shards
PASSES = 400_000  # images that a student sees in all, where nobody says it: an hour or less for small ones


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSummary:
    """What lies in a folder.

    Attributes:
        folder: that was looked at.
        images: their number; about, where some shards are estimated.
        classes: their names; empty where nobody says them.
        side: the median of the shorter sides that were read, in pixels.
        shards: training tars, or the names that `pack` will give them.
        val: validation tars, likewise.
        why: these are the ones for validation.
        packed: whether the shards are there.
        estimated: how many shards were not read, their samples estimated by their sizes.
    """

    folder: Path
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
    sides = []
    for path, _, _ in files[::step]:
        try:
            sides.append(min(size_in(path)))
        except BadImage:
            continue  # `pack` and `precompute` name what is broken
    if not sides:
        raise UserError(f"{folder}: none of the images that were looked at can be opened, such as {files[0][0]}")
    count = max(1, round(0.9 * len(files) / PER_SHARD))
    names = "shards/train-000000.tar" if count == 1 else f"shards/train-{{000000..{count - 1:06d}}}.tar"
    return ImageSummary(
        folder=folder,
        images=len(files),
        classes=classes,
        side=round(statistics.median(sides)),
        shards=[names],
        val=["shards/train-val-*.tar"],
        why="`pipeline pack` cuts them off",
        packed=False,
    )


def _shards(folder: Path, tars: Sequence[Path], home: Path, progress: Progress) -> ImageSummary:
    from precompute.plan import counted

    held = [path for path in tars if re.search(HELD_BACK, path.stem, re.IGNORECASE)]
    train = [path for path in tars if path not in held]
    why = "their names say val, valid, validation or test"
    if not held:
        held, train = train[-1:], train[:-1]
        why = "the last one, as no name says val, valid, validation or test"
    if not train:
        what = "training" if len(held) > 1 else "validation"
        raise UserError(
            f"{folder}: {len(tars)} shard(s) leave none for {what}; cut some off: "
            f"pipeline pack {shlex.quote(str(folder))} 'shards/train-{{000000..000009}}.tar' --val-fraction 0.1"
        )
    shards = counted(None, [str(path) for path in (*train, *held)], progress, skip=True)
    for shard in shards:
        if shard.opened is not None and (flaws := shard.opened.index.left_out):
            progress.say(f"{shard.url}: {counted_flaws(flaws)}: skipped by precompute --on-decode-error skip")
    first = next(shard.opened for shard in shards if shard.opened is not None)  # some are always read
    sides = []
    for sample in first.read(range(min(64, len(first)))):
        try:
            sides.append(min(decode(sample.image).size))
        except BadImage:
            continue
    if not sides:
        raise UserError(f"{first.url}: none of its first images can be decoded")
    classes = classes_of([str(path) for path in train]) or []
    return ImageSummary(
        folder=folder,
        images=sum(shard.samples for shard in shards),
        classes=list(classes),
        side=round(statistics.median(sides)),
        shards=[os.path.relpath(path, home) for path in train],
        val=[os.path.relpath(path, home) for path in held],
        why=why,
        packed=True,
        estimated=sum(shard.estimated for shard in shards),
    )


def sizes(side: int) -> tuple[int, int]:
    """View size and patch size for images of some size: a grid of 8 to 14 patches a side."""
    for largest, chosen in ((48, (32, 4)), (96, (64, 8)), (160, (128, 16))):
        if side <= largest:
            return chosen
    return 224, 16


def text(found: ImageSummary) -> str:
    """The project file."""
    view, patch = sizes(found.side)
    epochs = max(20, min(200, round(PASSES / max(1, found.images))))
    batch = 128 if found.images < 100_000 else 512
    small = "\n  embed_dim: 128\n  depth: 6\n  num_heads: 4" if view <= 64 else ""

    def several(names: Sequence[str]) -> str:
        quoted = [yaml.safe_dump(name, width=math.inf).removesuffix("...\n").strip() for name in names]
        return quoted[0] if len(names) == 1 else "\n" + "\n".join(f"  - {name}" for name in quoted)

    count = len(found.classes)
    ours = [
        "ours:                 # the same with a head for these classes: what fit-teacher writes, for deit-hard",
        "  teacher: vit_tiny",
        "  weights: ours.safetensors",
        f"  args: {{num_classes: {count or 10}}}",
        "  targets: logits",
    ]
    unknown = "\n  # num_classes: 10   # no classes.json lies beside the shards: say how many classes there are"
    mark = "" if found.classes else "# "
    ours_text = "\n".join(f"  {mark}{line}" for line in ours).lstrip()
    images = f"{'about ' if found.estimated else ''}{found.images:,} images"
    return f"""\
# {images}, {count or "unnamed"} classes, about {found.side} pixels on the shorter side.
# Flags override this file. All settings: docs/recipes.md; teachers: pipeline teachers; recipes: pipeline recipes.

shards: {several(found.shards)}
# For validation: {found.why}.
val: {several(found.val)}
store: store            # what the teachers saw; any number of students learn from it

views:                  # drawn once, stored, and replayed for every student
  policy: deit          # crops, flips, colors, erasing, mixing; light: crops and flips
  size: {view}
  count: {VIEWS}              # more views cost more space and generalize better: pipeline plan tells both

teachers:               # several may stand here; each takes its time and space once
  vit_tiny:             # a ViT with ImageNet's weights, from timm's hub; `pipeline teachers` lists others
    # weights: FILE.safetensors      # offline
    targets: [embedding, class_row]  # for fit-teacher, and for the recipe advit-l1
  {ours_text}
  # mobilenetv2:        # a CNN's activation maps, for the recipe aal
  #   targets: activations

student:
  model: vit_tiny_patch16_224
  img_size: {view}
  patch_size: {patch}         # {view // patch}x{view // patch} patches{small}{"" if found.classes else unknown}

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
    found = look(folder.expanduser(), out.parent, progress)
    out.write_text(text(found), encoding="utf-8")
    project = [] if out.name == "pipeline.yaml" and out.parent == Path() else ["--project", str(out)]
    words = [["plan"], ["precompute"], ["train", "--recipe", "scratch", "--out", "scratch"]]
    if found.classes:
        fitted = str(out.parent / "ours.safetensors")
        words = [
            ["plan", "--teacher", "vit_tiny"],
            ["precompute", "--teacher", "vit_tiny"],
            ["fit-teacher", "--teacher", "vit_tiny", "--out", fitted],
            ["precompute", "--teacher", "ours"],
            words[-1],
            ["train", "--recipe", "deit-hard", "--out", "taught"],
        ]
    words = [[*command, *project] for command in words]
    if not found.packed:
        where = [str(out.parent / found.shards[0]), "--val-fraction", "0.1"] if project else []
        words = [["pack", str(folder), *where], *words]
    return {
        "project": str(out),
        "images": found.images,
        "estimated": found.estimated,
        "classes": found.classes,
        "side": found.side,
        "val": found.val,
        "val_because": found.why,
        "commands": [shlex.join(["pipeline", *command]) for command in words],
    }
