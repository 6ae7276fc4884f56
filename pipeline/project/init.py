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
from storage.shards.image_folder import ImageSources, read_folder, shards_in
from storage.shards.tar import counted_flaws
from storage.views.render import BadImage, decode, size_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from storage.progress import Progress

T = TypeVar("T")
LOOKED_AT = 200  # images, spread over the folder, whose sizes are read
PER_SHARD = 1000  # samples
VIEWS = 4
HELD_BACK = r"(^|[-_.])(val|valid|validation|test)([-_.]|\d|$)"  # in the names of validation shards
HOLD_BACK = " --val-fraction 0.1"
FEW = 5000  # images without labels, for which the student is as small as small recipes make it
NOT_SCORED = "without labels, students are not scored"
PASSES = 400_000  # images that a student sees in all, where nobody says it: an hour or less for small ones


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSummary:
    """What lies in a folder.

    Attributes:
        images: their number; about, where some shards are estimated.
        labeled: whether they have labels.
        classes: the names of their classes; empty where nobody says them.
        side: the median of the shorter sides that were read, in pixels.
        shards: training tars, or the names that `pack` will give them.
        val: validation tars, likewise; none are needed without labels.
        why: these are the ones for validation.
        packed: whether the shards are there.
        estimated: how many shards were not read, their samples estimated by their sizes.
    """

    images: int
    labeled: bool
    classes: list[str]
    side: int
    shards: list[str]
    val: list[str]
    why: str
    packed: bool
    estimated: int = 0


def look(folder: Path, home: Path, progress: Progress) -> ImageSummary:
    """What lies in a folder: shards, or images, in one folder a class or without labels.

    Args:
        folder: to look at.
        home: where the project file will lie, and new shards in `shards` beside it.
        progress: for people.

    Raises:
        UserError: neither, only one image, or shards that leave none for training or for a validation that is needed.
    """
    if not folder.is_dir():
        hint = "Give one with images, in one folder a class if they have classes, or one with shards (.tar)."
        raise UserError(f"{folder}: no such folder", hint=hint)
    tars, odd = shards_in(folder)
    files: ImageSources = []
    classes: list[str] | None = None
    if not tars:
        files, classes, odd = read_folder(folder, progress.say)
    for line in odd:
        progress.say(f"skipped: {line}")
    summary = _shards(folder, [Path(tar) for tar in tars], home, progress) if tars else _images(folder, files, classes)
    if summary.images < 2:
        raise UserError(f"{folder}: only one image; training needs two or more")
    return summary


def _images(folder: Path, files: ImageSources, classes: list[str] | None) -> ImageSummary:
    step = max(1, len(files) // LOOKED_AT)
    broken = f"{folder}: none of the images that were looked at can be opened, such as {files[0][0]}"
    side = _side((path for path, _, _ in files[::step]), size_in, broken)
    labeled = classes is not None
    count = max(1, round((0.9 if labeled else 1.0) * len(files) / PER_SHARD))
    names = "shards/train-000000.tar" if count == 1 else f"shards/train-{{000000..{count - 1:06d}}}.tar"
    return ImageSummary(
        images=len(files),
        labeled=labeled,
        classes=classes or [],
        side=side,
        shards=[names],
        val=["shards/train-val-*.tar"] if labeled else [],
        why="`pipeline pack` cuts them off" if labeled else NOT_SCORED,
        packed=False,
    )


def _shards(folder: Path, tars: Sequence[Path], home: Path, progress: Progress) -> ImageSummary:
    from precompute.plan import counted

    held = [path for path in tars if re.search(HELD_BACK, path.stem, re.IGNORECASE)]
    train = [path for path in tars if path not in held]
    shards = counted(None, [str(path) for path in (*train, *held)], progress, skip=True)
    opened = [shard.opened for shard in shards if shard.opened is not None]  # some are always read
    labeled = any(shard.summary.labelled for shard in opened)
    why = "their names say val, valid, validation or test"
    if not held:
        why = "the last one, as no name says val, valid, validation or test" if labeled else NOT_SCORED
    val = held or (train[-1:] if labeled else [])
    train = [path for path in train if path not in val]
    if not train:
        what = "training" if len(val) > 1 else "validation"
        raise UserError(
            f"{folder}: {len(tars)} shard(s) leave none for {what}; cut some off: "
            f"pipeline pack {shlex.quote(str(folder))} 'shards/train-{{000000..000009}}.tar' --val-fraction 0.1"
        )
    for shard in opened:
        if flaws := shard.index.left_out:
            progress.say(f"{shard.url}: {counted_flaws(flaws)}: skipped by precompute --on-decode-error skip")
    first = opened[0]
    images = (sample.image for sample in first.read(range(min(64, len(first)))))
    side = _side(images, lambda image: decode(image).size, f"{first.url}: none of its first images can be decoded")
    return ImageSummary(
        images=sum(shard.samples for shard in shards),
        labeled=labeled,
        classes=list(classes_of([str(path) for path in train]) or []) if labeled else [],
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


def batch_size(images: int) -> int:
    """Samples of a batch: of few images so many that an epoch has four batches or more."""
    most = 128 if images < 100_000 else 512
    return max(2, min(most, 1 << max(images // 4, 1).bit_length() - 1))


def text(summary: ImageSummary) -> str:
    """The project file."""
    view, patch = sizes(summary.side)
    width, depth, heads = (128, 6, 4) if view <= 64 else (192, 12, 3)
    if not summary.labeled and summary.images < FEW:
        width, depth, heads = 96, 6, 3
    epochs = max(20, min(200 if summary.labeled else 100, round(PASSES / max(1, summary.images))))
    images = f"{'about ' if summary.estimated else ''}{summary.images:,} images"
    unknown = "\n  # num_classes: 10   # no classes.json lies beside the shards: say how many classes there are"
    count = f"{len(summary.classes) or 'unnamed'} classes" if summary.labeled else "no labels"
    val = f"# For validation: {summary.why}.\nval: {_listed(summary.val)}\n" if summary.val else ""
    return f"""\
# {images}, {count}, about {summary.side} pixels on the shorter side.
# Flags override this file. All settings: docs/recipes.md; teachers: pipeline teachers; recipes: pipeline recipes.

shards: {_listed(summary.shards)}
{val}store: store            # what the teachers saw; any number of students learn from it

views:                  # drawn once, stored, and replayed for every student
  policy: {VIEWS_OF[summary.labeled]}
  size: {view}
  count: {VIEWS}              # more views cost more space and generalize better: pipeline plan tells both

teachers:               # several may stand here; each takes its time and space once
{_teachers(len(summary.classes)) if summary.labeled else LABEL_FREE_TEACHERS}
student:
  model: vit_tiny_patch16_224
  img_size: {view}
  patch_size: {patch}         # {view // patch}x{view // patch} patches
  embed_dim: {width}
  depth: {depth}
  num_heads: {heads}{"" if summary.classes or not summary.labeled else unknown}

set:                    # over every recipe
  optim.epochs: {epochs}     # more are better, and take as many times longer
  optim.warmup_epochs: 5
  optim.lr: 0.001
  stream.batch_size: {batch_size(summary.images)}
  model_ema_decay: null  # averaged weights, as some recipes keep them, are for runs of many thousand steps
"""


def _listed(names: Sequence[str]) -> str:
    """One shard or several as a value of the project file."""
    quoted = [yaml.safe_dump(name, width=math.inf).removesuffix("...\n").strip() for name in names]
    return quoted[0] if len(names) == 1 else "\n" + "\n".join(f"  - {name}" for name in quoted)


def _teachers(classes: int) -> str:
    """The teachers that supervised recipes learn from; the head is for so many classes, 0 where nobody says it."""
    mark = "" if classes else "# "
    return f"""\
  vit_tiny:             # a ViT with ImageNet's weights, from timm's hub; `pipeline teachers` lists others
    # weights: FILE.safetensors      # offline
    targets: [embedding, class_row]  # for fit-teacher, and for the recipe advit-l1
  {mark}ours:                 # the same with a head for these classes: what fit-teacher writes, for deit-hard
  {mark}  teacher: vit_tiny
  {mark}  weights: ours.safetensors
  {mark}  args: {{num_classes: {classes or 10}}}
  {mark}  targets: logits
  # mobilenetv2:        # a CNN's activation maps, for the recipe aal
  #   targets: activations
"""


VIEWS_OF = {
    True: "deit          # crops, flips, colors, erasing, mixing; light: crops and flips",
    False: "rrc(0.2,1)|flip  # AttnDistill's crops and flips; deit: also colors, erasing, mixing",
}
LABEL_FREE_TEACHERS = """\
  dino_vit_s16:         # a self-supervised ViT, with weights from timm's hub; `pipeline teachers` lists others
    # weights: FILE.safetensors                        # offline
    targets: [class_token, "class_row,layers=last"]  # for the recipe attndistill; simreg and seed take the first alone
"""


def init(folder: Path, out: Path, progress: Progress) -> dict[str, Any]:
    """Look, and write the file; what was found, as plain data.

    Raises:
        UserError: as `look`; a file that already exists.
    """
    if out.exists():
        raise UserError(f"{out}: already exists; give another name with --out, or remove it")
    summary = look(folder.expanduser(), out.parent, progress)
    out.write_text(text(summary), encoding="utf-8")
    elsewhere = out.name != "pipeline.yaml" or out.parent != Path()
    project = f" --project {shlex.quote(str(out))}" if elsewhere else ""
    commands, later = _next(summary, str(out.parent / "ours.safetensors"))
    if not summary.packed:
        new = f" {shlex.quote(str(out.parent / summary.shards[0]))}{HOLD_BACK * summary.labeled}" * elsewhere
        commands = [f"pack {shlex.quote(str(folder))}{new}", *commands]

    def lines(commands: list[str]) -> list[str]:
        """As they are typed; `pack` reads no project."""
        return [f"pipeline {words}{project * (not words.startswith('pack '))}" for words in commands]

    return {
        "project": str(out),
        **{name: getattr(summary, name) for name in ("images", "estimated", "labeled", "classes", "side", "val")},
        "val_because": summary.why,
        "commands": lines(commands),
        "with_labels": lines(later),
    }


def _next(summary: ImageSummary, fitted: str) -> tuple[list[str], list[str]]:
    """The commands from shards to students, and those that wait for labels; `fitted` is what fit-teacher writes."""
    scratch = "train --recipe scratch --out scratch"
    if summary.classes:
        return [
            "plan --teacher vit_tiny",
            "precompute --teacher vit_tiny",
            f"fit-teacher --teacher vit_tiny --out {shlex.quote(fitted)}",
            "precompute --teacher ours",
            scratch,
            "train --recipe deit-hard --out taught",
        ], []
    if summary.labeled:
        return ["plan", "precompute", scratch], []
    train, val = "labeled-shards/train-000000.tar", "labeled-shards/train-val-000000.tar"
    weights = "--set student.pretrained=false --set student.weights=taught/last.safetensors"
    weights += " --set student.global_pool=token"  # which it was taught
    return [
        "plan",
        "precompute",
        "train --recipe attndistill-small --out taught",
        "export taught",
    ], [
        f"pack labeled {train}{HOLD_BACK}",
        f"evaluate knn taught --train-shards {train} --shards {val}",
        f"train --recipe fine-tune-small --out tuned --store '' {weights} --shards {train} --val {val}",
    ]
