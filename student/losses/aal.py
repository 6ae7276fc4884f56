"""AAL: adaptive attention links from a CNN's activation maps to a ViT's class-row attention maps.

Jin and Choi, "Adaptive Attention Link-based Regularization for Vision Transformers", equations 3 to 6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from precompute.taps import Attention, resize_matrix
from student.alignment.rules import align_activations
from student.alignment.student_spec import StudentSpec
from student.losses.base import Loss, LossInputs
from student.losses.parts import aal_links
from student.settings import AllLinks, Schedule, TeacherLossConfig, Weight, _linked
from student.targets.requirement import TargetRequirement
from student.targets.stored_target import Targets

EPSILON = 1e-12

Map = Literal["scaled", "printed", "full"]
Distance = Literal["mse", "norm", "sq"]


def class_maps(
    attention: Sequence[Attention],
    prefix: int,
    reading: Map,
    *,
    resize: Sequence[Float[Tensor, "P _patches"] | None] | None = None,
) -> Float[Tensor, "B M P"]:
    """A_(m,n) of Eq. 3 for all layers n and heads m: the class query's attention over the patch keys.

    `scaled`: softmax over patch keys with 1/√d, as in the paper's Eq. 2 and in the model (default). `printed`: the same
    without 1/√d. `full`: softmax over all keys, then the prefix columns are dropped.

    Args:
        attention: of each layer; lower precision than f32 is converted where it is used.
        prefix: how many of the N tokens come before the patches.
        reading: of Eq. 3.
        resize: for each layer the matrix that brings its maps to the common grid, or None where they
            are on it; None where all layers are.

    Returns:
        M maps of all layers and heads, P patches.
    """
    rows = []
    for layer, matrix in zip(attention, resize or [None] * len(attention), strict=True):
        scores = layer.scores(slice(0, 1), scale=1.0 if reading == "printed" else None)[:, :, 0]
        # Scores are cut, not keys: cutting keys would give each layer a gradient of its own size to fill.
        maps = scores.softmax(-1)[:, :, prefix:] if reading == "full" else scores[:, :, prefix:].softmax(-1)
        rows.append(maps if matrix is None else maps @ matrix.T)
    return torch.cat(rows, 1)


class AAL(nn.Module):
    """Links (Eq. 4) and loss (Eq. 5) between M student maps and C activation maps.

    A⁺_c = Σ_m w_cm A_m + b_c, trained jointly and dropped after training. Per image and channel, with Â = A⁺/‖A⁺‖₂
    and B̂ = B/‖B‖₂ over the P positions:

    `mse`: mean of (Â − B̂)² over batch, channels and positions (default); `norm`: ‖Â − B̂‖₂, mean over batch and
    channels; `sq`: its square, mean over batch and channels. Computed as ‖Â‖² + ‖B̂‖² − 2⟨Â, B̂⟩ from inner products,
    which costs a tenth of the printed form and has the same value.

    Args:
        maps: M, layers × heads of the student.
        channels: C of the target.
        distance: reading of Eq. 5.
        kept: 1 for each link that is trained and 0 for each that is pruned, which stays 0; None: all.
    """

    def __init__(
        self, maps: int, channels: int, distance: Distance = "mse", kept: Float[Tensor, "C M"] | None = None
    ) -> None:
        super().__init__()
        self.links = nn.Conv1d(maps, channels, 1)  # the 1×1 convolution of the paper, on flattened maps
        self.distance = distance
        self.register_buffer("kept", kept, persistent=False)
        self.kept: Tensor | None
        if kept is not None:
            with torch.no_grad():
                self.links.weight *= kept[:, :, None]

    def forward(self, maps: Float[Tensor, "B M P"], activations: Float[Tensor, "B C g g"]) -> Float[Tensor, ""]:
        """The loss.

        Args:
            maps: the student's A.
            activations: the teacher's B, with g·g = P.
        """
        targets = activations.flatten(2)
        positions = maps.shape[-1]
        weight = self.links.weight[:, :, 0]
        if self.kept is not None:  # no gradient: what is zero stays zero under any decay and momentum
            weight = weight * self.kept
        bias = self.links.bias
        assert bias is not None
        cross = maps @ targets.transpose(1, 2)
        # `.T` alone is strided, and the product then takes seven times as long
        inner = (cross * weight.T.contiguous()).sum(1) + bias * targets.sum(-1)
        gram = (maps @ maps.transpose(1, 2)).flatten(1)  # Σ_mn w_cm w_cn G_mn, as one product over the pairs (m, n)
        pairs = (weight.unsqueeze(2) * weight.unsqueeze(1)).flatten(1)
        square = gram @ pairs.T + 2 * bias * (maps.sum(-1) @ weight.T) + positions * bias.square()
        student_norm = square.clamp_min(0).add(EPSILON**2).sqrt()
        teacher_norm = targets.norm(dim=-1)
        unit = teacher_norm.square() / (teacher_norm + EPSILON).square()  # 1, or 0 for a map of zeros
        squared = (1 + unit - 2 * inner / (student_norm * (teacher_norm + EPSILON))).clamp_min(0)
        loss: Tensor = squared.add(EPSILON).sqrt().mean() if self.distance == "norm" else squared.mean()
        return loss / positions if self.distance == "mse" else loss


class AALConfig(TeacherLossConfig):
    """Settings of adaptive attention links.

    `links`: all (`full`), those of the paper's Table 1 (`alpha`, `beta`), for each stage of the target its first and
    last layer (from 1; null for none), or those of a run that Algorithm 1 keeps (its folder). `grid`: side of the maps
    that are compared; None: the student's own.
    """

    type: Literal["aal"] = "aal"
    weight: Weight = Schedule(start=2000.0, decay=0.99, then={200: 0.98})
    map: Map = "scaled"
    distance: Distance = "mse"
    links: Annotated[AllLinks, BeforeValidator(_linked)] = "full"
    grid: int | None = Field(None, ge=1)


class AALLoss(Loss[AALConfig]):
    """AAL as a term of the training loss."""

    Config = AALConfig
    STUDENT_TAPS = frozenset({"attention"})
    supports_pooling = True

    def __init__(self, name: str, config: AALConfig, student: StudentSpec, targets: Targets) -> None:
        super().__init__(name, config, student, targets)
        (stored,) = targets
        target, grid = stored.target, config.grid or student.grid
        stages, channels = (tuple(getattr(stage, name) for stage in target.stages) for name in ("stage", "channels"))
        layout = aal_links.Layout(stages, channels, tuple(heads for heads, _ in student.by_layer))
        stage_count = len(target.identity.tensors) or stored.depth
        kept = aal_links.kept(name, config.links, layout, stage_count)
        self.row = align_activations(name, stored, student, grid, kept.words)
        self.metadata = {**asdict(layout), "target": stored.id, "grid": grid}
        self.source_digest = kept.digest
        choice = None if kept.choice is None else layout.spread(kept.choice)
        self.aal = AAL(student.maps, target.sample_shape[0], config.distance, choice)
        self.prefix = len(student.prefix)
        self.sides = [side if side != grid else None for _, side in student.by_layer]
        for side in {side for side in self.sides if side}:
            axis = resize_matrix(side, grid)
            self.register_buffer(f"resize_{side}", torch.kron(axis, axis), persistent=False)

    @classmethod
    def requirement(cls, name: str, config: AALConfig, student: StudentSpec) -> TargetRequirement:
        """Activations on the student's own grid, or on the one that the recipe names."""
        taps, grid = (("activations",),), config.grid or student.grid
        return TargetRequirement(loss=name, taps=taps, teacher=config.teacher, target=config.target, grid=grid)

    def forward(self, inputs: LossInputs) -> Float[Tensor, ""]:
        """The loss of one step."""
        taps, resize = inputs.student_taps, [self.get_buffer(f"resize_{side}") if side else None for side in self.sides]
        maps = class_maps(taps.attention, self.prefix, self.config.map, resize=resize)
        loss: Tensor = self.aal(maps, inputs.targets[0])
        return loss
