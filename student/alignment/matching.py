"""What of teacher and student meets: which layers, heads and tokens, decided once for every loss that compares them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from precompute.taps import resize_matrix
from precompute.taps.target_spec import parse_ranges
from storage.errors import UserError
from student.alignment.report import AlignmentRow
from student.alignment.student_spec import StudentSpec
from student.settings import AlignedLossConfig, AlignmentConfig, setting
from student.targets.stored_target import StoredTarget

Which = Literal["class", "all", "scores", "vectors"]

MERGED = ("mean", "sum", "max", "min", "log")  # rules by which all heads of a side become one

# of a sample's tensor: whether it has heads, and the axis of its tokens
_AXES = {"class_row": (True, -1), "attention": (True, -1), "q": (True, -2), "k": (True, -2), "v": (True, -2),
         "tokens": (False, -2)}  # fmt: skip


class TokenMatching(nn.Module):
    """Which layers, heads and tokens of a target meet which of the student's.

    Args:
        loss: name of the loss, or `attention_copy`, for errors.
        settings: what the recipe states.
        student: its shape.
        given: one target of some tap with layers, or several of one teacher and the same layers.
        which: class rows, rows of all queries, scores (what these are the softmax of), or vectors of all tokens.

    Attributes:
        pairs: (student's layer, teacher's layer), from 1.
        heads: how many are compared; 1 where they are merged, 0 where the tap has none.
        head_pairs: (student's head, teacher's head), from 1, for each pair of layers; empty where they are merged.
        rule: how heads meet: as `AlignedLossConfig.heads`, with `auto` decided.
        stored: the teacher's layers that the target holds; those of `pairs` are among them.
        mine, theirs: buffers, indices of the tokens that meet: first those beside the patches, in one order of roles.
        prefix: how many of them are no patches.
        as_is: whether all tokens of a side (`mine`, `theirs`) meet in the order in which they stand.
        dropped: what is left out, in words.
        resize: buffer, the teacher's patches to the student's; only where their grids differ.

    Raises:
        UserError: what differs and was not stated, or cannot be brought together.
    """

    def __init__(
        self, loss: str, settings: AlignmentConfig, student: StudentSpec, given: Sequence[StoredTarget],
        which: Which,
    ) -> None:  # fmt: skip
        super().__init__()
        self.loss, self.settings, self.student, self.which = loss, settings, student, which
        self.path = path = setting(loss)
        first = given[0]
        self.tap = first.target.identity.tap
        teacher = first.teacher
        shape = first.target.sample_shape
        has_heads, axis = _AXES[self.tap]
        tokens = int(shape[axis])
        # tokens without layers are those after the final norm
        self.stored = [*(first.target.identity.layers or [teacher.layers])]
        prefix = [*teacher.prefix]
        side = round((tokens - len(prefix)) ** 0.5)
        if side * side != tokens - len(prefix):
            raise UserError(f"{loss}: target {first.id}: {tokens - len(prefix)} patches make no square grid")
        self.pairs = self._layers(teacher.layers)
        self.rule = settings.heads
        if settings.heads == "auto":
            self.rule = None if not has_heads or int(shape[1]) == student.heads else "log"
        self.head_pairs = self._heads(int(shape[1])) if has_heads else []
        self.heads = len(self.head_pairs[0]) if self.head_pairs else int(has_heads)
        mine, theirs, self.dropped = self._tokens(list(student.prefix), prefix)
        patches, grid = range(student.grid**2), range(side**2)
        self._constant("mine", torch.tensor([*mine, *(len(student.prefix) + p for p in patches)]))
        self._constant("theirs", torch.tensor([*theirs, *(len(prefix) + p for p in grid)]))
        self.prefix = len(mine)
        self.as_is = {"mine": mine == [*range(len(student.prefix))], "theirs": theirs == [*range(len(prefix))]}
        self.class_query = prefix.index("class") if "class" in prefix else 0
        self.resizes = side != student.grid
        if self.resizes:
            if settings.grid is None:
                raise UserError(
                    f"{loss}: target {first.id} has a grid of {side}x{side}, the student's patches make "
                    f"{student.grid}x{student.grid}; say how they meet: --set {path}.grid=bicubic"
                )
            matrix = resize_matrix(side, student.grid)
            self._constant("resize", torch.kron(matrix, matrix))
        self.row = self._row(given, int(shape[1]), side)

    def _constant(self, name: str, value: torch.Tensor) -> None:
        self.register_buffer(name, value, persistent=False)

    def _layers(self, depth: int) -> list[tuple[int, int]]:
        """(student's layer, teacher's layer), from 1."""
        mine, wish, loss, path = self.student.layers, self.settings.layers, self.loss, self.path
        if wish is None:
            if mine != depth:
                raise UserError(
                    f"{loss}: the teacher has {depth} layers, the student {mine}; say which meet: "
                    f"--set {path}.layers=uniform, last, first-N, last-N, or pairs [[1,2],[2,4]]"
                )
            if self.stored != list(range(1, depth + 1)):
                raise UserError(
                    f"{loss}: the target holds the teacher's layers {parse_ranges(self.stored)} of {depth}; say which "
                    f"of the student's meet them: --set {path}.layers=last, first-N, last-N, or pairs "
                    "[[student,teacher],…]"
                )
            pairs = [(n, n) for n in range(1, mine + 1)]
        elif wish == "uniform":
            pairs = uniform(mine, depth)
        elif isinstance(wish, str):
            end, _, several = wish.partition("-")
            count = int(several or 1)
            if count > min(mine, depth):
                raise UserError(
                    f"{loss}: {path}.layers={wish}: the student has {mine} layers, the teacher {depth}; at most "
                    f"{end}-{min(mine, depth)}, or uniform"
                )
            before = (0, 0) if end == "first" else (mine - count, depth - count)
            pairs = [(before[0] + n, before[1] + n) for n in range(1, count + 1)]
        else:
            pairs = [(int(a), int(b)) for a, b in wish]
        for own, other in pairs:
            if not (1 <= own <= mine and 1 <= other <= depth):
                raise UserError(
                    f"{loss}: {path}.layers lets the student's layer {own} meet the teacher's layer {other}; "
                    f"the student has layers 1 to {mine}, the teacher 1 to {depth}: "
                    f"--set {path}.layers=uniform, last, or other pairs"
                )
        for own, other in pairs:
            if other not in self.stored:
                raise UserError(
                    f"{loss}: the student's layer {own} meets the teacher's layer {other}, and the target holds "
                    f"{parse_ranges(self.stored)}; precompute layers={parse_ranges(sorted({b for _, b in pairs}))}"
                )
        if not pairs:
            raise UserError(f"{loss}: {path}.layers is empty")
        return pairs

    def _heads(self, theirs: int) -> list[list[tuple[int, int]]]:
        """(student's head, teacher's head), from 1, for each pair of layers; empty where they are merged."""
        mine, rule, loss, path = self.student.heads, self.rule, self.loss, self.path
        if rule in MERGED:
            return []
        if rule is None and mine != theirs:
            named = ["first", "first-N"]
            if isinstance(self.settings, AlignedLossConfig):  # else something is copied
                merged = MERGED if self.which in ("class", "all") else ()
                named = [*merged, *named, "pairs [[student,teacher],…]"]
            raise UserError(
                f"{loss}: the teacher has {theirs} heads, the student {mine}; say how they meet: "
                f"--set {path}.heads={', '.join(named[:-1])} or {named[-1]}"
            )
        if rule is None or isinstance(rule, str):
            count = int((rule or "").partition("-")[2] or min(mine, theirs))
            if count > min(mine, theirs):
                raise UserError(
                    f"{loss}: {path}.heads={rule}: the student has {mine} heads, the teacher {theirs}; at most "
                    f"first-{min(mine, theirs)}"
                )
            return [[(n, n) for n in range(1, count + 1)]] * len(self.pairs)
        if isinstance(rule, Mapping):
            layers = {own for own, _ in self.pairs}
            if layers != set(rule):
                raise UserError(
                    f"{loss}: {path}.heads names the student's layers {parse_ranges(sorted(rule))}, and those that "
                    f"meet are {parse_ranges(sorted(layers))}; say which with {path}.layers=[[student,teacher],…]"
                )
            found = [list(rule[own]) for own, _ in self.pairs]
        else:
            found = [list(rule)] * len(self.pairs)
        for own, other in (pair for pairs in found for pair in pairs):
            if not (1 <= own <= mine and 1 <= other <= theirs):
                raise UserError(
                    f"{loss}: {path}.heads lets the student's head {own} meet the teacher's head {other}; the "
                    f"student has heads 1 to {mine}, the teacher 1 to {theirs}: --set {path}.heads=[[1,1]]"
                )
        if not found[0] or len({len(pairs) for pairs in found}) > 1:
            raise UserError(
                f"{loss}: {path}.heads gives the layers {', '.join(str(len(pairs)) for pairs in found)} pairs "
                "of heads; give each as many, at least one, and other layers a loss of their own (another name, with "
                "`type`)"
            )
        return found

    def own_heads(self) -> list[tuple[int, list[int] | None]]:
        """For each pair of layers the student's layer, from 1, and its heads that meet, from 0; None for all."""
        if not self.head_pairs:
            return [(own, None) for own, _ in self.pairs]
        return [(own, [h - 1 for h, _ in heads]) for (own, _), heads in zip(self.pairs, self.head_pairs, strict=True)]

    def of_teacher(self, target: Tensor) -> Tensor:
        """The teacher's layers and heads that meet, `[B, L, H, …]`, of all that a decoded target holds."""
        layers = [self.stored.index(other) for _, other in self.pairs]
        heads = [[other - 1 for _, other in pairs] for pairs in self.head_pairs]
        if not heads or all(some == list(range(target.shape[2])) for some in heads):
            return target[:, layers]
        return target[:, torch.tensor(layers)[:, None], torch.tensor(heads)]

    def kept(self, values: Tensor, side: Literal["mine", "theirs"], axis: int) -> Tensor:
        """The tokens that meet, along an axis of one side's values, in the common order."""
        return values if self.as_is[side] else values.index_select(axis, self.get_buffer(side))

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

    def _row(self, given: Sequence[StoredTarget], heads: int, side: int) -> AlignmentRow:
        student = self.student
        rule = [f"layers {', '.join(f'{a}-{b}' for a, b in self.pairs)} (student-teacher)"]
        if self.heads:
            rule.append(self._head_rule(heads))
        if self.resizes:
            kept = ", mass kept" if self.which in ("class", "all") else ""
            rule.append(f"patches {side}x{side} to {student.grid}x{student.grid} (bicubic{kept})")
        if self.dropped:
            rescaled = ", the rest rescaled" if self.which in ("class", "all") else ""
            rule.append(f"left out{rescaled}: {', '.join(self.dropped)}")
        taps = " and ".join(stored.target.identity.tap for stored in given)
        source = "" if self.tap in ("class_row", "attention") else f" from {taps}"
        what = {
            "class": f"class rows{source}", "all": f"rows of all queries{source}", "scores": f"scores{source}",
            "vectors": taps,
        }[self.which]  # fmt: skip
        by_head = f", {heads} heads" if self.heads else ""
        return AlignmentRow(
            self.loss, given[0].id, f"{what}, layers {parse_ranges(self.stored)}{by_head}, {side}x{side} patches",
            f"{student.layers} layers" + (f" x {student.heads} heads" if self.heads else "")
            + f", {student.grid}x{student.grid} patches",
            "; ".join(rule),
        )  # fmt: skip

    def _head_rule(self, heads: int) -> str:
        """How heads meet, in words."""
        wish, given = self.rule, self.settings.head_temperature
        if wish is None:
            return f"{heads} heads one to one"
        if isinstance(wish, str):
            return {
                "mean": "mean over heads on both sides", "sum": "sum over heads on both sides",
                "max": "largest over heads on both sides, rescaled",
                "min": "smallest over heads on both sides, rescaled",
                "log": "mean of logarithms over heads on both sides, "
                f"T = {f'{given:g}' if given else 'the number of heads'}",
            }.get(wish, f"the first {self.heads} heads")  # fmt: skip
        said = [", ".join(f"{a}-{b}" for a, b in pairs) for pairs in self.head_pairs]
        if not isinstance(wish, Mapping):
            return f"heads {said[0]} (student-teacher)"
        return "heads " + "; ".join(f"{text} of layer {own}" for text, (own, _) in zip(said, self.pairs, strict=True))


def uniform(mine: int, depth: int) -> list[tuple[int, int]]:
    """(student's layer, teacher's layer), from 1: the student's l meets the teacher's round(l · N_t / N_s)."""
    return [(n, max(1, int(n * depth / mine + 0.5))) for n in range(1, mine + 1)]


def pick(layer: Tensor, heads: list[int] | None) -> Tensor:
    """Some heads of `[B, H, …]`, from 0; all of them as they are."""
    if heads is None or heads == list(range(layer.shape[1])):
        return layer
    return layer[:, : len(heads)] if heads == list(range(len(heads))) else layer[:, heads]
