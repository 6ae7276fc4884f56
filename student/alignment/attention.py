"""Attention of teacher and student, as rows or scores, both sides in one shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from precompute.taps import Attention, full
from storage.errors import UserError
from student.alignment.matching import Side, TokenMatching
from student.alignment.student_spec import StudentSpec
from student.settings import AlignmentConfig, Average
from student.targets.stored_target import Targets

EPSILON = 1e-12  # of sums that rows are divided by

# Codec -> the smallest part of a row's largest value that it tells from zero: a stored zero may be anything below it.
LEAST = {"f16": 2.0**-24, "log8": 2.0**-16, "u8": 2.0**-9}

LEAST_RESIZED = 1e-6  # where bicubic resizing made zeros of what it had made negative

# Rule -> how rows of all heads become one, before those of `max` and `min` are rescaled.
_MERGED: dict[str, Callable[..., Tensor]] = {"mean": torch.mean, "sum": torch.sum, "max": torch.amax, "min": torch.amin}

_AXES = {"layers": 1, "heads": 2, "queries": -2}  # that rows are averaged over


class AttentionAligner(TokenMatching):
    """Attention of teacher and student, brought together layer by layer, head by head, token by token.

    Both sides come as f32 `[B, L, H, N]` for class rows and `[B, L, H, Q, N]` for all rows; every row sums to one, or
    to the number of heads where these are added up. `scores` are what all rows are the softmax of, each side's with its
    own 1/√d. Arguments as for `TokenMatching`: one target (`class_row`, `attention`), or two (`q`, `k`), for scores;
    and `average`: over which axis the teacher's rows are averaged, each row then being their mean. Over `examples` all
    images get `mean`, a buffer `[L, H, …]` that is saved with what losses learn; `student.training.controls.fill_means`
    fills it.
    """

    def __init__(
        self,
        loss: str,
        config: AlignmentConfig,
        student: StudentSpec,
        targets: Targets,
        which: Literal["class", "all", "scores"],
        *,
        average: Average = "none",
    ) -> None:
        super().__init__(loss, config, student, targets, which)
        self.average = average
        if which == "class":
            index = student.prefix.index("class")
            self.student_class = slice(index, index + 1)
        elif student.attention is not None and student.attention.layers[0].queries == 1:
            raise UserError(
                f"{loss}: in the student's layers the class token alone attends, so it has class rows alone"
            )
        if average != "none":
            self.row = replace(self.row, rule=f"{self.row.rule}; the teacher's averaged over {average}")
        if average == "examples":
            tokens = len(self.get_buffer("student_tokens"))
            queries = () if which == "class" else (tokens,)
            self.register_buffer("mean", torch.zeros(len(self.pairs), self.heads, *queries, tokens))
        first = targets[0].target
        scales = first.scales or [first.sample_shape[-1] ** -0.5] * len(self.stored)
        self.scales = [*scales] if self.tap == "q" else []  # of the teacher
        self.least = 0.0 if self.tap == "q" else LEAST.get(first.identity.codec, 0.0)
        if self.resizes:
            self.least = LEAST_RESIZED

    def student_rows(self, attention: Sequence[Attention], *, weigh: bool = False) -> Float[Tensor, "B _L _H ... _N"]:
        """The student's rows, or scores, with gradients.

        Args:
            attention: of all of its layers (`StudentTaps.attention`).
            weigh: whether class rows are weighted by the norms of the values that they attend to.
        """
        if self.rule == "log":
            return self.student_logs(attention, weigh=weigh).exp()
        layers = self._student_scores(attention, weigh)
        return torch.cat([part if self.which == "scores" else self._merge(part.softmax(-1)) for part in layers], 1)

    def student_logs(self, attention: Sequence[Attention], *, weigh: bool = False) -> Float[Tensor, "B _L _H ... _N"]:
        """The logarithms of `student_rows`, from the scores: finite, and with gradients, however small a row's entry.

        Losses take logarithms from here: `student_rows().log()` has no gradient below a floor.
        """
        layers = self._student_scores(attention, weigh)  # one by one: a layer's tensors may stay in the cache
        return torch.cat([self._merge_logs(part.log_softmax(-1)) for part in layers], 1)

    def _merge_logs(self, logs: Tensor) -> Tensor:
        """`_merge` of logarithms of rows."""
        if self.head_pairs:
            return logs
        if self.rule in ("mean", "sum"):
            return log_sum(logs) - (math.log(logs.shape[2]) if self.rule == "mean" else 0)
        if self.rule in ("max", "min"):
            return _MERGED[str(self.rule)](logs, 2, keepdim=True).log_softmax(-1)
        return log_mean(logs, self.config.head_temperature)

    def _student_scores(self, attention: Sequence[Attention], weigh: bool) -> Iterator[Float[Tensor, "B 1 _H ..."]]:
        """Layer by layer, the scores whose softmax the student's rows are: before heads are merged."""
        for n, heads in self.student_heads():
            layer = attention[n - 1]
            layer = layer if heads is None else layer.of_heads(heads)
            if self.which == "class":
                scores = layer.scores(self.student_class)[:, :, 0]
                if weigh:  # weighting a row by factors adds their logarithms to its scores
                    assert layer.v is not None
                    norms = full(layer.v).norm(dim=-1)
                    scores = scores + norms.clamp_min(torch.finfo(norms.dtype).tiny).log()
            else:
                scores = layer.scores()
            yield self._keep(scores[:, None], "student", rescale=False)

    def teacher_rows(
        self, targets: Sequence[Float[Tensor, "B L H ..."]], v: Float[Tensor, "B L H _N d"] | None = None
    ) -> Float[Tensor, "B _L _H ... _N"]:
        """The teacher's rows on the student's grid, averaged by `average`, from decoded targets.

        With v, the decoded values, class rows are weighted by their norms.
        """
        if self.average == "examples":
            mean = self.get_buffer("mean")
            return mean.expand(len(targets[0]), *mean.shape)
        return self.rows_of_each(targets, v)

    def teacher_logs(self, targets: Sequence[Float[Tensor, "B L H ..."]]) -> Float[Tensor, "B _L _H ... _N"]:
        """The logarithms of `teacher_rows`; a stored zero counts as the smallest value that its codec keeps."""
        return self._logs(self.teacher_rows(targets))

    def rows_of_each(
        self, targets: Sequence[Float[Tensor, "B L H ..."]], v: Float[Tensor, "B L H _N d"] | None = None
    ) -> Float[Tensor, "B _L _H ... _N"]:
        """The teacher's rows as `teacher_rows` gives them, but never averaged over examples."""
        if self.tap == "q":
            q, k = (full(self.of_teacher(target)) for target in targets)
            if self.which == "class":
                q = q[..., self.class_query : self.class_query + 1, :]
            scales = q.new_tensor([self.scales[self.stored.index(n)] for _, n in self.pairs]).view(-1, 1, 1, 1)
            rows = q * scales @ k.transpose(-2, -1)
            rows = rows if self.which == "scores" else rows.softmax(-1)
            rows = rows[..., 0, :] if self.which == "class" else rows
        else:
            rows = full(self.of_teacher(targets[0]))
            if self.which == "class" and self.tap == "attention":
                rows = rows[..., self.class_query, :]
        if v is not None:
            rows = weighted(rows, full(self.of_teacher(v)))
        rows = self._keep(rows, "teacher", rescale=self.which != "scores")
        if self.resizes:
            rows = self._resize(rows)
        if self.average in _AXES:
            rows = rows.mean(_AXES[self.average], keepdim=True).expand_as(rows)
        return self._merge(rows)

    def _keep(self, rows: Tensor, side: Side, rescale: bool) -> Tensor:
        """The kept tokens in the common order; of all rows, the kept queries too."""
        if self.which != "class":
            rows = self.kept(rows, side, -2)
        kept = self.kept(rows, side, -1)
        return scaled(kept) if kept.shape[-1] < rows.shape[-1] and rescale else kept

    def _resize(self, rows: Tensor) -> Tensor:
        """Patch keys, and patch queries, onto the student's grid (PAPERS' Eq. 7 of AttnDistill, generalized)."""
        matrix = self.get_buffer("resize")
        if self.which == "scores":  # no masses to keep: as vectors over keys, then over queries
            return self.resized(self.resized(rows.transpose(-1, -2)).transpose(-1, -2))
        prefix, patches = rows[..., : self.prefix], rows[..., self.prefix :]
        mass = patches.sum(-1, keepdim=True)
        patches = (patches @ matrix.T).clamp_min(0)
        patches = patches * (mass / patches.sum(-1, keepdim=True).clamp_min(EPSILON))
        rows = torch.cat([prefix, patches], -1)
        if self.which == "all":
            queries = scaled((matrix @ rows[..., self.prefix :, :]).clamp_min(0))
            rows = torch.cat([rows[..., : self.prefix, :], queries], -2)
        return rows

    def _merge(self, rows: Tensor) -> Tensor:
        if self.head_pairs:
            return rows
        if self.rule == "log":
            return log_mean(self._logs(rows), self.config.head_temperature).exp()
        merged: Tensor = _MERGED[str(self.rule)](rows, 2, keepdim=True)
        return scaled(merged) if self.rule in ("max", "min") else merged

    def _logs(self, rows: Tensor) -> Tensor:
        """Logarithms of stored rows."""
        floor = rows.amax(-1, keepdim=True).mul(self.least).clamp_min(torch.finfo(rows.dtype).tiny)
        return rows.maximum(floor).log()


def scaled(rows: Float[Tensor, "*axes N"]) -> Float[Tensor, "*axes N"]:
    """Rows that sum to one."""
    return rows / rows.sum(-1, keepdim=True).clamp_min(EPSILON)


def log_sum(logs: Float[Tensor, "B L H *Q N"]) -> Float[Tensor, "B L 1 *Q N"]:
    """log Σ_h a^h of logarithms of rows: `logsumexp`, with a cheaper gradient."""
    largest = logs.detach().amax(2, keepdim=True)
    return (logs - largest).exp().sum(2, keepdim=True).log() + largest


def log_mean(logs: Float[Tensor, "B L H *Q N"], temperature: float | None = None) -> Float[Tensor, "B L 1 *Q N"]:
    """The logarithm of AttnDistill's aggregation of heads, Eq. 9 to 11: log softmax_j((1/T) Σ_h log a_j^h).

    Args:
        logs: logarithms of rows, log a.
        temperature: T; by default the number of heads, which gives their geometric mean.
    """
    return (logs.sum(2, keepdim=True) / (temperature or logs.shape[2])).log_softmax(-1)


def weighted(rows: Float[Tensor, "*axes N"], v: Float[Tensor, "*axes N d"]) -> Float[Tensor, "*axes N"]:
    """Rows with each key's attention times the norm of its value, summing to one again."""
    return scaled(rows * v.norm(dim=-1))
