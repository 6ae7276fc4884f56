"""Attention rows of teacher and student, and vectors of their tokens, both sides brought into one shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from precompute.taps import attention_rows, class_row
from storage.errors import UserError
from student import config
from student.align import Given, Shape, full
from student.matching import Matching

FLOOR = 1e-6  # of probabilities before a logarithm
EPSILON = 1e-12


class Rows(Matching):
    """Attention rows of teacher and student, brought together layer by layer, head by head, token by token.

    Both sides come as f32 `[B, L, H, N]` for class rows and `[B, L, H, Q, N]` for all rows; every row sums to one.
    Arguments as for `Matching`: one target (`class_row`, `attention`), or two (`q`, `k`).
    """

    def __init__(
        self, loss: str, settings: config.Matched, student: Shape, given: Sequence[Given],
        which: Literal["class", "all"],
    ) -> None:  # fmt: skip
        super().__init__(loss, settings, student, given, which)
        first = given[0].target
        width = first["sample_shape"][-1]
        self.scales = first.get("scales", [width**-0.5] * len(self.stored)) if self.tap == "q" else []  # of the teacher

    def student_rows(self, q: Sequence[Tensor], k: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
        """The student's rows, with gradients, from q and k of all of its layers, `[B, H, N, d]` each."""
        rows = []
        for n, _ in self.pairs:
            queries, keys, scale = q[n - 1], full(k[n - 1]), scales[n - 1]
            if self.which == "class":
                at = self.student.prefix.index("class")
                rows.append(class_row(full(queries[:, :, at : at + 1]), keys, scale))  # the others are never converted
            else:
                rows.append(attention_rows(full(queries), keys, scale))
        return self._merge(self._keep(torch.stack(rows, 1), self.get_buffer("mine"), self.drops_mine))

    def teacher_rows(self, targets: Sequence[Tensor]) -> Tensor:
        """The teacher's rows on the student's grid, from decoded targets `[B, L, H, …]`."""
        chosen = [self.stored.index(other) for _, other in self.pairs]
        if self.tap == "q":
            q, k = (full(target[:, chosen]) for target in targets)
            if self.which == "class":
                q = q[..., self.class_query : self.class_query + 1, :]
            scales = q.new_tensor([self.scales[i] for i in chosen]).view(-1, 1, 1, 1)
            rows = (q * scales @ k.transpose(-2, -1)).softmax(-1)
            rows = rows[..., 0, :] if self.which == "class" else rows
        else:
            rows = full(targets[0][:, chosen])
            if self.which == "class" and self.tap == "attention":
                rows = rows[..., self.class_query, :]
        rows = self._keep(rows, self.get_buffer("theirs"), self.drops_theirs)
        if self.resizes:
            rows = self._resize(rows)
        return self._merge(rows)

    def _keep(self, rows: Tensor, tokens: Tensor, drops: bool) -> Tensor:
        """The kept tokens in the common order; of all rows, the kept queries too."""
        if self.which == "all":
            rows = rows.index_select(-2, tokens)
        rows = rows.index_select(-1, tokens)
        return rows / rows.sum(-1, keepdim=True).clamp_min(EPSILON) if drops else rows

    def _resize(self, rows: Tensor) -> Tensor:
        """Patch keys, and patch queries, onto the student's grid (PAPERS' Eq. 7 of AttnDistill, generalised)."""
        matrix = self.get_buffer("resize")
        prefix, patches = rows[..., : self.prefix], rows[..., self.prefix :]
        mass = patches.sum(-1, keepdim=True)
        patches = (patches @ matrix.T).clamp_min(0)
        patches = patches * (mass / patches.sum(-1, keepdim=True).clamp_min(EPSILON))
        rows = torch.cat([prefix, patches], -1)
        if self.which == "all":
            queries = (matrix @ rows[..., self.prefix :, :]).clamp_min(0)
            queries = queries / queries.sum(-1, keepdim=True).clamp_min(EPSILON)
            rows = torch.cat([rows[..., : self.prefix, :], queries], -2)
        return rows

    def _merge(self, rows: Tensor) -> Tensor:
        rule = self.settings.heads
        if rule is None or rule == "first":
            return rows[:, :, : self.heads]
        if rule == "mean":
            return rows.mean(2, keepdim=True)
        return log_mean(rows, self.settings.temperature)


def log_mean(rows: Tensor, temperature: float | None = None) -> Tensor:
    """AttnDistill's aggregation of heads, Eq. 9 to 11: softmax_j((1/T) Σ_h log a_j^h).

    Args:
        rows: probabilities `[B, L, H, …, N]`, floored at 1e-6.
        temperature: T; by default the number of heads, which gives their geometric mean.

    Returns:
        `[B, L, 1, …, N]`.
    """
    total = rows.clamp_min(FLOOR).log().sum(2, keepdim=True)
    return (total / (temperature or rows.shape[2])).softmax(-1)


class Vectors(Matching):
    """Vectors of tokens (q, k, v, or tokens of the residual stream), brought together layer by layer, token by token.

    Both sides come as f32 `[B, L, H, N, d]` for q, k and v and `[B, L, N, D]` for tokens, each in its own width.
    Arguments as for `Matching`, with one target.
    """

    def __init__(self, loss: str, settings: config.Matched, student: Shape, given: Sequence[Given]) -> None:
        if settings.heads in ("mean", "log"):
            raise UserError(
                f"{loss}: vectors of different heads cannot be merged; say --set losses.{loss}.heads=first, or null"
            )
        super().__init__(loss, settings, student, given, "vectors")

    def student_vectors(self, layers: Sequence[Tensor]) -> Tensor:
        """The student's vectors, with gradients, from those of all of its layers."""
        chosen = torch.stack([full(layers[n - 1]) for n, _ in self.pairs], 1)
        return self._some_heads(chosen.index_select(-2, self.get_buffer("mine")))

    def teacher_vectors(self, target: Tensor) -> Tensor:
        """The teacher's vectors on the student's grid, from a decoded target."""
        chosen = [self.stored.index(other) for _, other in self.pairs]
        vectors = full(target[:, chosen]).index_select(-2, self.get_buffer("theirs"))
        if self.resizes:
            matrix = self.get_buffer("resize")
            vectors = torch.cat([vectors[..., : self.prefix, :], matrix @ vectors[..., self.prefix :, :]], -2)
        return self._some_heads(vectors)

    def _some_heads(self, vectors: Tensor) -> Tensor:
        return vectors[:, :, : self.heads] if self.heads else vectors
