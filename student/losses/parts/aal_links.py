"""AAL's links: which of them are kept, by the paper's Table 1, by ranges of layers, or by Algorithm 1 from a run's.

A link joins one map of the teacher (a channel of a stage) and one class-row map of the student (a head of a layer).
Links are kept or pruned for all heads of a layer together: a choice is a table of bool `[C, N]`, channels and layers.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Float64
from safetensors import SafetensorError, safe_open
from torch import Tensor

from storage.errors import UserError, did_you_mean, first_line, setting
from storage.rounding import constant
from student import run_dir
from student.settings import AllLinks, LinksConfig

# Table 1: for each of EfficientNet's seven stages the first and last of DeiT-S's twelve layers.
TABLE: dict[str, tuple[tuple[int, int], ...]] = {
    "alpha": ((1, 3), (1, 5), (3, 5), (4, 6), (4, 6), (6, 11), (7, 12)),
    "beta": ((1, 2), (1, 5), (3, 5), (4, 6), (4, 7), (6, 10), (7, 10)),
}
LAYERS = 12  # of the table's student
_WHERE = ".aal.links.weight"  # after the loss's name


@dataclass(frozen=True)
class Layout:
    """The maps that links join.

    Attributes:
        stages: numbers of the teacher's stages.
        channels: number of channels in each stage, together C.
        heads: number of heads in each of the student's N layers, together M.
    """

    stages: tuple[int, ...]
    channels: tuple[int, ...]
    heads: tuple[int, ...]

    @property
    def text(self) -> str:
        """For errors."""
        heads = f"{self.heads[0]} heads" if len(set(self.heads)) == 1 else f"{_joined(self.heads)} heads"
        return f"{_joined(self.channels)} maps and {len(self.heads)} layers of {heads}"

    def spread(self, kept: Bool[Tensor, "C N"]) -> Float[Tensor, "C M"]:
        """A choice as one number a link, 0 or 1."""
        return kept.float().repeat_interleave(torch.tensor(self.heads), 1)

    def count(self, kept: Bool[Tensor, "C N"]) -> int:
        """How many links a choice keeps."""
        return int(self.spread(kept).sum())

    def heat(self, weights: Float[Tensor, "C M"]) -> Float64[Tensor, "stages N"]:
        """The paper's Figure 2: the mean of |w| over a stage's maps and a layer's heads."""
        means = _by_layer(weights.double().abs(), self.heads)
        return torch.stack([stage.mean(0) for stage in torch.split(means, list(self.channels))])


@dataclass(frozen=True)
class Trained:
    """The links that a run ended with.

    Attributes:
        where: path of their file, for errors.
        loss: name of the loss in the run's recipe.
        target: id of the target that they were trained with.
        layout: the maps that they join.
        weights: w of each link.
    """

    where: str
    loss: str
    target: str
    layout: Layout
    weights: Float[Tensor, "C M"]


def ranged(ranges: Sequence[tuple[int, int] | None], layout: Layout, where: str) -> Bool[Tensor, "C N"]:
    """The choice that links each stage to its range of layers, ends included; None links it to none.

    Raises:
        UserError: not one range for each stage, or layers that the student does not have.
    """
    depth = len(layout.heads)
    if len(ranges) != len(layout.channels):
        raise UserError(
            f"{where}: {len(ranges)} ranges of layers for the target's {len(layout.channels)} stages; give each stage "
            "its first and last layer, such as [[1, 3], [2, 4]], or null for none"
        )
    rows = []
    for stage, channels, span in zip(layout.stages, layout.channels, ranges, strict=True):
        first, last = span or (1, 0)
        if span and not 1 <= first <= last <= depth:
            raise UserError(f"{where}: stage {stage}: layers {first} to {last}; the student has layers 1 to {depth}")
        row = torch.tensor([first <= n <= last for n in range(1, depth + 1)])
        rows.append(row.expand(channels, depth))
    return torch.cat(rows)


def tabled(name: Literal["alpha", "beta"], layout: Layout, stages: int, where: str) -> Bool[Tensor, "C N"]:
    """The choice of Table 1.

    Args:
        name: which of its two rows.
        layout: the maps that links join.
        stages: number of the teacher's stages, also of those that the target does not hold.
        where: for errors.

    Raises:
        UserError: the table is for another teacher or student.
    """
    ranges = TABLE[name]
    if stages != len(ranges) or len(layout.heads) != LAYERS:
        raise UserError(
            f"{where}={name}: the paper's Table 1 is for a teacher of {len(ranges)} stages and a student of {LAYERS} "
            f"layers; here are {stages} and {len(layout.heads)}",
            hint="Give each stage its first and last layer, such as [[1, 3], [2, 4]], or take them from a run with "
            f"full links: {setting(where, 'RUN')}",
        )
    return ranged([ranges[n - 1] for n in layout.stages], layout, where)


def extracted(weights: Float[Tensor, "C M"], layout: Layout, config: LinksConfig) -> Bool[Tensor, "C N"]:
    """Algorithm 1: the choice of trained links whose normalized mean over heads is above the threshold.

    `printed`: w ← (w − min w) / (max w − min w), then |·|, which changes nothing: a link of weight 0 lies near 0.5, so
    this keeps all of Gaussian or Laplacian links. `abs` (default): the same for |w|. `block` takes the mean over a
    stage's channels too, so that a stage is linked to whole layers, as in Table 1.

    Args:
        weights: w of each link.
        layout: the maps that they join.
        config: normalization, granularity and threshold.
    """
    values = weights.double()
    values = values.abs() if config.normalize == "abs" else values
    low, high = values.min(), values.max()
    same = constant(float(low), float(high))
    values = torch.zeros_like(values) if same else ((values - low) / (high - low)).abs()
    means = _by_layer(values, layout.heads)
    if config.granularity == "block":
        means = torch.cat([part.mean(0).expand(len(part), -1) for part in torch.split(means, list(layout.channels))])
    return means > config.threshold


def _by_layer(values: Float64[Tensor, "C M"], heads: Sequence[int]) -> Float64[Tensor, "C N"]:
    """The mean over each layer's heads."""
    return torch.stack([part.mean(1) for part in torch.split(values, list(heads), 1)], 1)


def ranges_of(kept: Bool[Tensor, "C N"], layout: Layout) -> list[list[int] | None] | None:
    """A choice as a recipe writes it, stage for stage; None where some stage is not linked to a range of layers."""
    ranges: list[list[int] | None] = []
    for part in torch.split(kept, list(layout.channels)):
        layers = [n for n, is_kept in enumerate(part[0].tolist(), 1) if is_kept]
        if not bool((part == part[0]).all()) or (layers and layers[-1] - layers[0] >= len(layers)):
            return None
        ranges.append([layers[0], layers[-1]] if layers else None)
    return ranges


@dataclass(frozen=True)
class Kept:
    """Which links a loss trains.

    Attributes:
        choice: the links that are kept; None keeps all.
        words: for the alignment table.
        digest: of a choice that was taken from a run, which may change; None for other choices.
    """

    choice: Bool[Tensor, "C N"] | None
    words: str
    digest: str | None = None


def kept(loss: str, links: AllLinks, layout: Layout, stages: int) -> Kept:
    """The links that a recipe's `links` keep.

    Args:
        loss: name of the loss.
        links: the setting.
        layout: the maps that links join.
        stages: number of the teacher's stages.

    Raises:
        UserError: they do not fit teacher and student, keep nothing, or the run has no such links.
    """
    channels, maps = sum(layout.channels), sum(layout.heads)
    if links == "full":
        return Kept(None, f"full links, {channels * (maps + 1):,} weights")
    where, digest, note = f"losses.{loss}.links", None, ""
    if isinstance(links, LinksConfig):
        run = read(links.run, links.loss, where)
        if run.layout != layout:
            raise UserError(
                f"{where}: the links of {run.where} join {run.layout.text}; this run has {layout.text}. They fit "
                "only a student and a teacher of the same shape."
            )
        if run_dir.is_smoke(Path(links.run).expanduser()):
            raise UserError(f"{where}: {run.where} comes from a smoke run, whose links are untrained")
        choice = extracted(run.weights, layout, links)
        digest = hashlib.sha256(choice.numpy().tobytes()).hexdigest()
        name = f"links of {links.run} ({links.normalize}, by {links.granularity}, above {links.threshold:g})"
        if not choice.any():
            hint = f"Lower the threshold: {setting(f'{where}.threshold', 'X')}"
            raise UserError(f"{where}: {name}: none is kept", hint=hint)
        if choice.all():
            note = f", all of them{_WHY if links.normalize == 'printed' else ''}"
    else:
        name = f"{links} links" if isinstance(links, str) else "links by ranges"
        choice = tabled(links, layout, stages, where) if isinstance(links, str) else ranged(links, layout, where)
        if not choice.any():
            raise UserError(f"{where}: no stage is linked to any layer")
    count = layout.count(choice)
    return Kept(choice, f"{name}: {count:,} of {channels * maps:,} weights{note}, {channels:,} biases", digest)


_WHY = " (printed puts a weight of 0 near the middle of 0 to 1; abs prunes)"


def read(run: str | Path, loss: str | None, where: str = "links") -> Trained:
    """The links that a run ended with.

    Args:
        run: the run's folder.
        loss: which of its AAL losses; None where it has one.
        where: start of errors.

    Raises:
        UserError: no complete run with links in this folder, several AAL losses and no `loss`, or a file that `train`
            does not write.
    """
    path = Path(run).expanduser() / run_dir.LOSSES
    known = "the folder of a complete run with an aal loss"
    known = f"{', '.join(('full', *TABLE))}, ranges, or {known}" if where.startswith("losses.") else known
    try:
        with safe_open(path, "pt") as file:
            metadata, names = file.metadata() or {}, [n for n in file.keys() if n.endswith(_WHERE)]  # noqa: SIM118
            losses = [name.removesuffix("." + _WHERE[1:]) for name in names]
            if not losses:
                raise UserError(f"{where}: {path}: the run had no aal loss, so there are no links")
            if loss is None and len(losses) > 1:
                hint = f"Choose one: {setting(f'{where}.loss' if where.startswith('losses.') else 'loss', 'NAME')}"
                raise UserError(f"{where}: {path} has links of {', '.join(losses)}", hint=hint)
            if loss is not None and loss not in losses:
                raise UserError(f"{where}: {path} has no links of {loss!r}. {did_you_mean(loss, losses)}")
            name = loss or losses[0]
            weights = file.get_tensor(name + _WHERE)
    except FileNotFoundError:
        raise UserError(f"{where}: {run}: no links here ({run_dir.LOSSES} is missing); expected {known}") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{where}: {path}: cannot be read: {first_line(error)}") from None
    about = _about(metadata.get(name), f"{where}: {path}")
    layout = Layout(*(tuple(about[part]) for part in _PARTS))
    expected = (sum(layout.channels), sum(layout.heads), 1)
    if tuple(weights.shape) != expected or weights.dtype != torch.float32 or not weights.isfinite().all():
        raise UserError(
            f"{where}: {path}: links are {weights.dtype} {list(weights.shape)}; expected finite torch.float32 "
            f"{list(expected)}"
        )
    return Trained(str(path), name, str(about["target"]), layout, weights[:, :, 0])


_PARTS = ("stages", "channels", "heads")
_MOST = 100_000  # stages, channels and heads are far fewer


def _about(text: str | None, where: str) -> dict[str, Any]:
    """The metadata that `AALLoss` wrote beside its links."""
    if text is None:
        raise UserError(f"{where}: it does not say what its links join: an older version wrote it; train again")
    try:
        about = json.loads(text)
        lists = [about[part] for part in _PARTS]
        whole = all(isinstance(n, int) and 0 < n < _MOST for numbers in lists for n in numbers)
        fits = isinstance(about["target"], str) and all(lists) and len(lists[0]) == len(lists[1])
        if not (whole and fits and math.prod(map(len, lists)) < _MOST**2):
            raise ValueError("numbers that cannot be")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{where}: what it says of its links cannot be read: {first_line(error)}") from None
    return dict(about)


def _joined(numbers: Sequence[int]) -> str:
    return " + ".join(map(str, numbers))
