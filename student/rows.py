"""Attention rows of teacher and student: which layers, heads and tokens meet, and both sides brought into one shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from precompute.taps import attention_rows, class_row, resize_matrix
from storage.errors import UserError
from student import config
from student.align import Given, Row, Shape, full

FLOOR = 1e-6  # of probabilities before a logarithm
EPSILON = 1e-12


class Rows(nn.Module):
    """Attention rows of teacher and student, brought together layer by layer, head by head, token by token.

    Both sides come as f32 `[B, L, H, N]` for class rows and `[B, L, H, Q, N]` for all rows; every row sums to one.

    Args:
        loss: name for errors.
        settings: what the recipe states.
        student: its shape.
        given: one target (`class_row`, `attention`), or two (`q`, `k`).
        which: class rows, or those of all queries.

    Raises:
        UserError: what differs and was not stated, or cannot be brought together.
    """

    def __init__(
        self, loss: str, settings: config.Matched, student: Shape, given: Sequence[Given],
        which: Literal["class", "all"],
    ) -> None:  # fmt: skip
        super().__init__()
        self.loss, self.settings, self.student, self.which = loss, settings, student, which
        first = given[0]
        self.tap = str(first.target["identity"]["tap"])
        teacher = first.teacher
        self.stored: list[int] = first.target["identity"]["layers"]
        shape = first.target["sample_shape"]
        heads, tokens = int(shape[1]), int(shape[2 if self.tap in ("q", "k") else -1])
        prefix: list[str] = teacher["prefix"]
        side = round((tokens - len(prefix)) ** 0.5)
        if side * side != tokens - len(prefix):
            raise UserError(f"{loss}: target {first.id}: {tokens - len(prefix)} patches make no square grid")
        self.scales = [first.target.get("scales", [shape[-1] ** -0.5] * len(self.stored))] if self.tap == "q" else []
        self.pairs = self._layers(teacher["layers"])
        self.heads = self._heads(heads)
        mine, theirs, self.dropped = self._tokens(list(student.prefix), prefix)
        patches, grid = range(student.grid**2), range(side**2)
        self._constant("mine", torch.tensor([*mine, *(len(student.prefix) + p for p in patches)]))
        self._constant("theirs", torch.tensor([*theirs, *(len(prefix) + p for p in grid)]))
        self.prefix = len(mine)  # tokens that both sides have beside their patches
        self.drops_mine, self.drops_theirs = len(mine) < len(student.prefix), len(theirs) < len(prefix)
        self.class_query = prefix.index("class") if "class" in prefix else 0
        self.resizes = side != student.grid
        if self.resizes:
            if settings.grid is None:
                raise UserError(
                    f"{loss}: target {first.id} has a grid of {side}x{side}, the student's patches make "
                    f"{student.grid}x{student.grid}; say how they meet: --set losses.{loss}.grid=bicubic"
                )
            axis = resize_matrix(side, student.grid)
            self._constant("resize", torch.kron(axis, axis))
        self.row = self._row(first, heads, side)

    def _constant(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value, persistent=False)

    # What is said of layers, heads and tokens.

    def _layers(self, depth: int) -> list[tuple[int, int]]:
        """(student's layer, teacher's layer), from 1."""
        mine, wish, loss = self.student.layers, self.settings.layers, self.loss
        if wish is None:
            if mine != depth:
                raise UserError(
                    f"{loss}: the teacher has {depth} layers, the student {mine}; say which meet: "
                    f"--set losses.{loss}.layers=uniform, last, or pairs [[1,2],[2,4]]"
                )
            if self.stored != list(range(1, depth + 1)):
                raise UserError(
                    f"{loss}: the target holds the teacher's layers {_ranges(self.stored)} of {depth}; say which of "
                    f"the student's meet them: --set losses.{loss}.layers=last, or pairs [[student,teacher],…]"
                )
            pairs = [(n, n) for n in range(1, mine + 1)]
        elif wish == "last":
            pairs = [(mine, depth)]
        elif wish == "uniform":
            pairs = [(n, max(1, int(n * depth / mine + 0.5))) for n in range(1, mine + 1)]
        else:
            pairs = [(int(a), int(b)) for a, b in wish]
        for own, other in pairs:
            if not (1 <= own <= mine and 1 <= other <= depth):
                raise UserError(
                    f"{loss}: losses.{loss}.layers lets the student's layer {own} meet the teacher's layer {other}; "
                    f"the student has layers 1 to {mine}, the teacher 1 to {depth}: "
                    f"--set losses.{loss}.layers=uniform, last, or other pairs"
                )
        for own, other in pairs:
            if other not in self.stored:
                raise UserError(
                    f"{loss}: the student's layer {own} meets the teacher's layer {other}, and the target holds "
                    f"{_ranges(self.stored)}; precompute layers={_ranges(sorted({b for _, b in pairs}))}"
                )
        if not pairs:
            raise UserError(f"{loss}: losses.{loss}.layers is empty")
        return pairs

    def _heads(self, theirs: int) -> int:
        """How many heads are compared."""
        mine, rule = self.student.heads, self.settings.heads
        if rule is None:
            if mine != theirs:
                raise UserError(
                    f"{self.loss}: the teacher has {theirs} heads, the student {mine}; say how they meet: "
                    f"--set losses.{self.loss}.heads=mean, log or first"
                )
            return mine
        return min(mine, theirs) if rule == "first" else 1

    def _tokens(self, mine: list[str], theirs: list[str]) -> tuple[list[int], list[int], list[str]]:
        """Prefix tokens that are kept on either side, and those that are left out, in words."""
        if self.which == "class":
            for side, roles in (("student", mine), ("teacher", theirs)):
                if "class" not in roles:
                    raise UserError(
                        f"{self.loss}: the {side} has no class token, so it has no class rows; take one that has"
                    )
        counts, others = Counter(mine), Counter(theirs)
        kept = {role for role in counts if counts[role] == others[role]}  # registers only where both have as many
        dropped = [
            f"{side}'s {role}" + (f" ({count})" if count > 1 else "")
            for side, roles in (("student", counts), ("teacher", others))
            for role, count in roles.items()
            if role not in kept
        ]
        order = [role for role in dict.fromkeys(mine) if role in kept]
        found = [[i for role in order for i, r in enumerate(roles) if r == role] for roles in (mine, theirs)]
        return found[0], found[1], dropped

    def _row(self, first: Given, heads: int, side: int) -> Row:
        rows = "class rows" if self.which == "class" else "rows of all queries"
        student = self.student
        rule = [f"layers {', '.join(f'{a}-{b}' for a, b in self.pairs)} (student-teacher)"]
        rule.append({
            None: f"{heads} heads one to one", "mean": "mean over heads on both sides",
            "log": "mean of logarithms over heads on both sides, "
                   + (f"T = {self.settings.temperature:g}" if self.settings.temperature else "T = the number of heads"),
            "first": f"the first {self.heads} heads",
        }[self.settings.heads])  # fmt: skip
        if self.resizes:
            rule.append(f"patches {side}x{side} to {student.grid}x{student.grid} (bicubic, mass kept)")
        if self.dropped:
            rule.append(f"left out, the rest rescaled: {', '.join(self.dropped)}")
        source = "" if self.tap in ("class_row", "attention") else " from q and k"
        return Row(
            self.loss, first.id,
            f"{rows}{source}, layers {_ranges(self.stored)}, {heads} heads, {side}x{side} patches",
            f"{student.layers} layers x {student.heads} heads, {student.grid}x{student.grid} patches",
            "; ".join(rule),
        )  # fmt: skip

    # The rows themselves.

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
            scales = q.new_tensor([self.scales[0][i] for i in chosen]).view(-1, 1, 1, 1)
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


def _ranges(layers: Sequence[int]) -> str:
    """`1:4+8`, as `--target` takes it."""
    runs: list[list[int]] = []
    for n in layers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return "+".join(str(a) if a == b else f"{a}:{b}" for a, b in runs)
