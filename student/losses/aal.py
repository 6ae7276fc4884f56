"""AAL: adaptive attention links from a CNN's activation maps to a ViT's class-row attention maps.

Jin and Choi, "Adaptive Attention Link-based Regularization for Vision Transformers", equations 3 to 6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from precompute.taps import class_scores, resize_matrix
from student.alignment.rules import align_activations
from student.alignment.student_spec import StudentSpec, full
from student.alignment.student_taps import StudentTap
from student.losses.base import LossInputs
from student.losses.parts import aal_links
from student.settings import AllLinks, Schedule, TeacherLossConfig, Weight, _linked
from student.targets.requirement import TargetRequirement
from student.targets.stored_target import StoredTarget

EPSILON = 1e-12

Map = Literal["scaled", "printed", "full"]
Reading = Literal["mse", "norm", "sq"]


def class_maps(
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    scales: Sequence[float],
    prefix: int,
    how: Map,
    resize: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """A_(m,n) of Eq. 3 for all layers n and heads m: the class query's attention over the patch keys.

    `scaled`: softmax over patch keys with 1/√d, as the same paper's Eq. 2 and the model attend (default). `printed`:
    likewise without 1/√d. `full`: softmax over all keys, then the prefix columns are dropped.

    Args:
        q: queries of each layer, `[B, H, N, d]`; lower precision than f32 is converted where it is used.
        k: keys of each layer, `[B, H, N, d]`, likewise.
        scales: 1/√d of each layer.
        prefix: how many of the N tokens come before the patches.
        how: the reading of Eq. 3.
        resize: of each layer the matrix `[P, its patches]` that brings its maps to the common grid, or None where they
            are on it; without it all are.

    Returns:
        `[B, M, P]`, M maps of all layers and heads, P patches.
    """
    rows = []
    for queries, keys, scale, matrix in zip(q, k, scales, resize or [None] * len(q), strict=True):
        scores = class_scores(full(queries[:, :, :1]), full(keys), 1.0 if how == "printed" else scale)
        # Cut scores: cutting keys would give each layer a gradient of its own size to fill.
        maps = scores.softmax(-1)[:, :, prefix:] if how == "full" else scores[:, :, prefix:].softmax(-1)
        rows.append(maps if matrix is None else maps @ matrix.T)
    return torch.cat(rows, 1)


class AAL(nn.Module):
    """Links (Eq. 4) and loss (Eq. 5) between M student maps and C activation maps.

    A⁺_c = Σ_m w_cm A_m + b_c, trained jointly and dropped after training. Per image and channel, with Â = A⁺/‖A⁺‖₂
    and B̂ = B/‖B‖₂ over the P positions:

    `mse`: mean of (Â − B̂)² over batch, channels and positions (default); `norm`: ‖Â − B̂‖₂, mean over batch and
    channels; `sq`: its square, mean likewise. Computed as ‖Â‖² + ‖B̂‖² − 2⟨Â, B̂⟩ from inner products, which costs a
    tenth of the printed form and has the same value.

    Args:
        maps: M, layers × heads of the student.
        channels: C of the target.
        reading: of Eq. 5.
        kept: `[C, M]`, 1 for each link that is trained and 0 for each that is pruned, which is and stays 0; None: all.
    """

    def __init__(self, maps: int, channels: int, reading: Reading = "mse", kept: Tensor | None = None) -> None:
        super().__init__()
        self.links = nn.Conv1d(maps, channels, 1)  # the 1×1 convolution of the paper, on flattened maps
        self.reading = reading
        self.register_buffer("kept", kept, persistent=False)
        self.kept: Tensor | None
        if kept is not None:
            with torch.no_grad():
                self.links.weight *= kept[:, :, None]

    def forward(self, maps: Tensor, activations: Tensor) -> Tensor:
        """The loss, a scalar.

        Args:
            maps: the student's A, `[B, M, P]`.
            activations: the teacher's B, `[B, C, g, g]` with g·g = P.
        """
        targets = activations.flatten(2)
        positions = maps.shape[-1]
        weight = self.links.weight[:, :, 0]
        if self.kept is not None:  # no gradient: what is zero stays zero under any decay and momentum
            weight = weight * self.kept
        bias = self.links.bias
        assert bias is not None
        across = maps @ targets.transpose(1, 2)
        # `.T` alone is strided, and the product then takes seven times as long
        inner = (across * weight.T.contiguous()).sum(1) + bias * targets.sum(-1)
        gram = (maps @ maps.transpose(1, 2)).flatten(1)  # Σ_mn w_cm w_cn G_mn, as one product over the pairs (m, n)
        pairs = (weight.unsqueeze(2) * weight.unsqueeze(1)).flatten(1)
        square = gram @ pairs.T + 2 * bias * (maps.sum(-1) @ weight.T) + positions * bias.square()
        mine = square.clamp_min(0).add(EPSILON**2).sqrt()
        theirs = targets.norm(dim=-1)
        unit = theirs.square() / (theirs + EPSILON).square()  # 1, or 0 for a map of zeros
        distance = (1 + unit - 2 * inner / (mine * (theirs + EPSILON))).clamp_min(0)
        loss: Tensor = distance.add(EPSILON).sqrt().mean() if self.reading == "norm" else distance.mean()
        return loss / positions if self.reading == "mse" else loss


POOLED = True


class Settings(TeacherLossConfig):
    """Adaptive attention links.

    `links`: all (`full`), those of the paper's Table 1 (`alpha`, `beta`), for each stage of the target its first and
    last layer (from 1; null for none), or what Algorithm 1 keeps of a run's (its folder). `grid` is the side of the
    maps that meet; None: the student's own.
    """

    type: Literal["aal"] = "aal"
    weight: Weight = Schedule(start=2000.0, decay=0.99, then={200: 0.98})
    map: Literal["scaled", "printed", "full"] = "scaled"
    distance: Literal["mse", "norm", "sq"] = "mse"
    links: Annotated[AllLinks, BeforeValidator(_linked)] = "full"
    grid: int | None = Field(None, ge=1)


def reads(settings: Settings) -> frozenset[StudentTap]:
    """The student's class rows."""
    return frozenset({"attention"})


def need(name: str, settings: Settings, student: StudentSpec) -> TargetRequirement:
    """Activations on the student's own grid, or the one that is said."""
    return TargetRequirement(
        name, (("activations",),), settings.teacher, settings.target, settings.grid or student.grid
    )


class Method(nn.Module):
    """AAL as a term of the training loss.

    Attributes:
        about: goes with the trained links, and says what they join.
        chosen: digest of links that were taken from another run; None of others.
    """

    def __init__(self, name: str, settings: Settings, student: StudentSpec, given: Sequence[StoredTarget]) -> None:
        super().__init__()
        target, grid = given[0].target, settings.grid or student.grid
        stages = target.stages
        layout = aal_links.Layout(
            tuple(stage.stage for stage in stages), tuple(stage.channels for stage in stages),
            tuple(heads for heads, _ in student.by_layer),
        )  # fmt: skip
        count = len(target.identity.tensors) or given[0].teacher.layers
        kept = aal_links.kept(name, settings.links, layout, count)
        self.row = align_activations(name, given[0], student, grid, kept.words)
        self.about = {**asdict(layout), "target": given[0].id, "grid": grid}
        self.chosen = kept.digest
        choice = None if kept.choice is None else layout.spread(kept.choice)
        self.aal = AAL(student.maps, target.sample_shape[0], settings.distance, choice)
        self.map, self.prefix = settings.map, len(student.prefix)
        self.sides = [side if side != grid else None for _, side in student.by_layer]
        for side in {side for side in self.sides if side}:
            axis = resize_matrix(side, grid)
            self.register_buffer(f"resize_{side}", torch.kron(axis, axis), persistent=False)

    def forward(self, step: LossInputs) -> Tensor:
        """The loss of one step."""
        seen, resize = step.student, [self.get_buffer(f"resize_{side}") if side else None for side in self.sides]
        maps = class_maps(seen.q, seen.k, seen.scales, self.prefix, self.map, resize)
        return self.aal(maps, step.targets[0])  # type: ignore[no-any-return]
