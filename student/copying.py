"""Attention Copy: chosen layers of a student attend with the teacher's stored attention in place of their own.

Li et al., "On the Surprising Effectiveness of Attention Transfer for Vision Transformers", sections 2.2 and 4.1. It is
no loss but a change of the student's forward pass: what is copied goes in by hooks, where the network has its own.

    map   A_t V_s                       q   softmax(Q_t K_sᵀ/√d) V_s
    qk    softmax(Q_t K_tᵀ/√d) V_s      k   softmax(Q_s K_tᵀ/√d) V_s      v   A_s V_t

What is replaced gets no gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from precompute.taps import attention_layers
from storage.errors import UserError
from student.align import WITH_CLASS, WITHOUT, Given, Shape
from student.choose import Need
from student.loss_settings import COPYING, Copying
from student.losses.attention_transfer import taps_of
from student.rows import Rows, Vectors

if TYPE_CHECKING:
    from student.lending import Lender

COPIED = "copied."  # what tensors that every image gets are called in a student's file
Copied = Mapping[str, Tensor]  # `map`, `q`, `k` or `v` -> [B, L, h, N, …] of the layers and heads that are copied


def need(settings: Copying) -> Need:
    """What is copied from."""
    return Need(COPYING, taps_of(settings.what), settings.teacher, settings.target)


class Copies:
    """The places of a student where copied attention goes in.

    A student that it is attached to does not run before it is told what to attend with.

    Args:
        what: `map`, `q`, `k`, `v` or `qk`.
        layers: of the student, from 1.
        heads: how many, the first ones; the others go on with their own.

    Attributes:
        fixed: what every image gets, `[1, L, h, N, …]`; empty where each has its own.
        lender: where images that are evaluated get theirs from; None until somebody says it.
    """

    def __init__(self, what: str, layers: Sequence[int], heads: int) -> None:
        self.parts = (what,) if what == "map" else tuple(what)
        self.layers, self.heads = tuple(layers), heads
        self.fixed: Copied = {}
        self.lender: Lender | None = None
        self._given: Copied = {}

    def attach(self, model: nn.Module) -> None:
        """Put the hooks on a plain ViT; whole maps go in where probabilities are, so these layers are unfused."""
        layers = attention_layers(model)
        for at, n in enumerate(self.layers):
            layer: Any = layers[n - 1]
            if "map" in self.parts:
                layer.fused_attn, layer.copies_maps = False, True
                layer.attn_drop.register_forward_pre_hook(functools.partial(self._map, at, layer))
            for part in {"q", "k"} & {*self.parts}:
                getattr(layer, f"{part}_norm").register_forward_hook(functools.partial(self._vectors, part, at))
            if "v" in self.parts:
                layer.qkv.register_forward_hook(functools.partial(self._values, at, layer.num_heads))
        model.teacher_copies = self  # type: ignore[assignment]

    @contextmanager
    def given(self, copied: Copied) -> Iterator[None]:
        """Attend with this meanwhile."""
        self._given = copied
        try:
            yield
        finally:
            self._given = {}

    def _of(self, part: str, at: int, own: Tensor) -> Tensor:
        """What goes in place of a layer's own `[B, H, N, …]`, its other heads with it."""
        copied = (self._given or self.fixed).get(part)
        if copied is None:
            raise UserError(
                f"this student attends with its teacher's {'attention' if part == 'map' else part} in "
                f"{len(self.layers)} layer(s), and nothing gives it here; `pipeline predict` does, and "
                "`pipeline evaluate` for accuracies"
            )
        new = copied[:, at].to(own).expand(len(own), *copied.shape[2:])
        return new if self.heads == own.shape[1] else torch.cat([new, own[:, self.heads :]], 1)

    def _map(self, at: int, layer: Any, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self._of("map", at, args[0]),)

    def _vectors(self, part: str, at: int, module: nn.Module, args: Any, own: Tensor) -> Tensor:
        return self._of(part, at, own)

    def _values(self, at: int, heads: int, module: nn.Module, args: Any, own: Tensor) -> Tensor:
        """The last third of the joint projection `[B, N, 3·H·d]`."""
        width = own.shape[-1] // 3
        values = own[..., 2 * width :].reshape(*own.shape[:2], heads, width // heads).transpose(1, 2)
        return torch.cat([own[..., : 2 * width], self._of("v", at, values).transpose(1, 2).flatten(2)], -1)


def copies_of(model: nn.Module) -> Copies | None:
    """The copies that are attached to a student."""
    found = getattr(model, "teacher_copies", None)
    return found if isinstance(found, Copies) else None


def copies_in(record: Mapping[str, Any]) -> Copies:
    """The places of a recorded student where copied attention goes in. Raises KeyError, ValueError or TypeError."""
    settings = Copying.model_validate(record["settings"])
    return Copies(settings.what, [int(n) for n in record["layers"]], int(record["heads"]))


class Copier(nn.Module):
    """Turns the teacher's stored targets into what a student's layers copy.

    Args:
        settings: what is copied where.
        student: its shape.
        given: the targets.

    Raises:
        UserError: what differs and was not stated, tokens of the student that the teacher lacks, other widths.
    """

    def __init__(self, settings: Copying, student: Shape, given: Sequence[Given]) -> None:
        super().__init__()
        name, self.what = COPYING, settings.what
        self.meets: Rows | Vectors
        if settings.what == "map":
            self.meets = Rows(name, settings, student, given, "all", settings.average)
        else:
            self.meets = Vectors(name, settings, student, given)
            self.meets.require_width(f"copy maps, which have none: --set {name}.what=map")
        if self.meets.get_buffer("mine").tolist() != list(range(len(student.prefix) + student.grid**2)):
            has_class = "class" in given[0].teacher["prefix"]
            also, proposed = (
                ("whose only one is the class token", WITH_CLASS) if has_class else ("of patches alone", WITHOUT)
            )
            lacks = ", ".join(word for word in self.meets.dropped if word.startswith("student"))
            raise UserError(
                f"{name}: every token of a copied layer needs the teacher's attention, and the teacher lacks the "
                f"{lacks}; take a student {also}: --set student.model={proposed}"
            )
        layers = [own for own, _ in self.meets.pairs]
        for n in layers:
            if layers.count(n) > 1:
                raise UserError(f"{name}.layers: the student's layer {n} can copy one layer, not {layers.count(n)}")
        self.copies = Copies(settings.what, layers, self.meets.heads)
        self.row = self.meets.row
        # softmax(q·kᵀ·scale) is the teacher's attention; the student's layers scale by 1/√d
        scales = given[0].target.get("scales")
        self.factors: list[float] = []
        if isinstance(self.meets, Vectors) and settings.what == "qk" and scales:
            at = [self.meets.stored.index(other) for _, other in self.meets.pairs]
            self.factors = [scales[i] * self.meets.own**0.5 for i in at]

    def copied(self, targets: Sequence[Tensor]) -> Copied:
        """What is copied, from decoded targets `[B, L, H, …]`."""
        if isinstance(self.meets, Rows):
            return {"map": self.meets.teacher_rows(targets)}
        found = {part: self.meets.teacher_vectors(target) for part, target in zip(self.what, targets, strict=True)}
        if self.factors:
            found["q"] = found["q"] * found["q"].new_tensor(self.factors).view(-1, 1, 1, 1)
        return found
