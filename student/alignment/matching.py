"""Which layers, heads and tokens of teacher and student are compared, decided once for every loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from precompute.taps import TAPS, resize_matrix
from precompute.taps.target_spec import parse_ranges
from storage.errors import UserError, setting
from student.alignment.report import AlignmentRow
from student.alignment.student_spec import StudentSpec
from student.settings import AlignedLossConfig, AlignmentConfig, settings_path
from student.targets.stored_target import StoredTarget

Which = Literal["class", "all", "scores", "vectors"]
Side = Literal["student", "teacher"]

MERGED = ("mean", "sum", "max", "min", "log")  # rules by which all heads of a side become one


class TokenMatching(nn.Module):
    """Which layers, heads and tokens of a target are compared with which of the student's.

    Args:
        loss: name of the loss, or `attention_copy`, for errors.
        config: what the recipe states.
        student: the student's shape.
        targets: one target of some tap with layers, or several of one teacher and the same layers.
        which: class rows, rows of all queries, scores (whose softmax the rows are), or vectors of all tokens.

    Attributes:
        pairs: (student's layer, teacher's layer), from 1.
        heads: how many are compared; 1 where they are merged, 0 where the tap has none.
        head_pairs: (student's head, teacher's head), from 1, for each pair of layers; empty where they are merged.
        rule: how heads are compared: as `AlignmentConfig.heads`, with `auto` decided.
        stored: the teacher's layers that the target holds; those of `pairs` are among them.
        student_tokens, teacher_tokens: buffers, indices of the tokens that are compared: first those beside the
            patches, in one order of roles.
        prefix: how many of them are no patches.
        all_tokens: side -> whether all its tokens are compared, in their own order.
        dropped: the tokens that are left out, in words.
        resize: buffer, the teacher's patches to the student's; only where their grids differ.

    Raises:
        UserError: what differs and was not stated, or cannot be brought together.
    """

    def __init__(
        self,
        loss: str,
        config: AlignmentConfig,
        student: StudentSpec,
        targets: Sequence[StoredTarget],
        which: Which,
    ) -> None:
        super().__init__()
        self.loss, self.config, self.student, self.which = loss, config, student, which
        self.path = path = settings_path(loss)
        first = targets[0]
        self.tap = first.target.identity.tap
        teacher = first.teacher
        shape = first.target.sample_shape
        axes = TAPS[self.tap].axes
        has_heads, tokens = "head" in axes, shape[axes.index("token")]
        # tokens without layers are those after the final norm
        self.stored = [*(first.target.identity.layers or [teacher.layers])]
        prefix = [*teacher.prefix]
        side = round((tokens - len(prefix)) ** 0.5)
        if side * side != tokens - len(prefix):
            raise UserError(f"{loss}: target {first.id}: {tokens - len(prefix)} patches make no square grid")
        self.pairs = self._layers(teacher.layers)
        self.rule = config.heads
        if config.heads == "auto":
            self.rule = None if not has_heads or int(shape[1]) == student.heads else "log"
        self.head_pairs = self._heads(int(shape[1])) if has_heads else []
        self.heads = len(self.head_pairs[0]) if self.head_pairs else int(has_heads)
        student_prefix, teacher_prefix, self.dropped = self._prefix_tokens(list(student.prefix), prefix)
        student_patches, teacher_patches = range(student.grid**2), range(side**2)
        self._constant(
            "student_tokens", torch.tensor([*student_prefix, *(len(student.prefix) + p for p in student_patches)])
        )
        self._constant("teacher_tokens", torch.tensor([*teacher_prefix, *(len(prefix) + p for p in teacher_patches)]))
        self.prefix = len(student_prefix)
        self.all_tokens: dict[Side, bool] = {
            "student": student_prefix == [*range(len(student.prefix))],
            "teacher": teacher_prefix == [*range(len(prefix))],
        }
        self.class_query = prefix.index("class") if "class" in prefix else 0
        self.resizes = side != student.grid
        if self.resizes:
            if config.grid is None:
                raise UserError(
                    f"{loss}: target {first.id} has a grid of {side}x{side}, the student's patches make "
                    f"{student.grid}x{student.grid}",
                    hint=f"Resize the teacher's: {setting(f'{path}.grid', 'bicubic')}",
                )
            matrix = resize_matrix(side, student.grid)
            self._constant("resize", torch.kron(matrix, matrix))
        self.row = self._row(targets, int(shape[1]), side)

    def _constant(self, name: str, value: torch.Tensor) -> None:
        self.register_buffer(name, value, persistent=False)

    def _layers(self, teacher_depth: int) -> list[tuple[int, int]]:
        """(student's layer, teacher's layer), from 1."""
        layers, loss, path = self.config.layers, self.loss, self.path
        student_depth = self.student.layers
        if layers is None:
            if student_depth != teacher_depth:
                raise UserError(
                    f"{loss}: the teacher has {teacher_depth} layers, the student {student_depth}",
                    hint=f"Choose which layers meet: {setting(f'{path}.layers', 'uniform')}, last, first-N, last-N, or "
                    "pairs [[1,2],[2,4]]",
                )
            if self.stored != list(range(1, teacher_depth + 1)):
                raise UserError(
                    f"{loss}: the target holds the teacher's layers {parse_ranges(self.stored)} of {teacher_depth}",
                    hint=f"Choose which of the student's layers meet them: {setting(f'{path}.layers', 'last')}, "
                    "first-N, last-N, or pairs [[student,teacher],…]",
                )
            pairs = [(n, n) for n in range(1, student_depth + 1)]
        elif layers == "uniform":
            pairs = uniform(student_depth, teacher_depth)
        elif isinstance(layers, str):
            end, _, number = layers.partition("-")
            count = int(number or 1)
            if count > min(student_depth, teacher_depth):
                raise UserError(
                    f"{loss}: {path}.layers={layers}: the student has {student_depth} layers, the teacher "
                    f"{teacher_depth}; at most {end}-{min(student_depth, teacher_depth)}, or uniform"
                )
            before = (0, 0) if end == "first" else (student_depth - count, teacher_depth - count)
            pairs = [(before[0] + n, before[1] + n) for n in range(1, count + 1)]
        else:
            pairs = [(int(a), int(b)) for a, b in layers]
        for student_layer, teacher_layer in pairs:
            if not (1 <= student_layer <= student_depth and 1 <= teacher_layer <= teacher_depth):
                raise UserError(
                    f"{loss}: {path}.layers lets the student's layer {student_layer} meet the teacher's layer "
                    f"{teacher_layer}; the student has layers 1 to {student_depth}, the teacher 1 to {teacher_depth}",
                    hint=f"Give {setting(f'{path}.layers', 'uniform')}, last, or other pairs",
                )
        for student_layer, teacher_layer in pairs:
            if teacher_layer not in self.stored:
                raise UserError(
                    f"{loss}: the student's layer {student_layer} meets the teacher's layer {teacher_layer}, and the "
                    f"target holds {parse_ranges(self.stored)}; precompute "
                    f"layers={parse_ranges(sorted({layer for _, layer in pairs}))}"
                )
        if not pairs:
            raise UserError(f"{loss}: {path}.layers is empty")
        return pairs

    def _heads(self, teacher_heads: int) -> list[list[tuple[int, int]]]:
        """(student's head, teacher's head), from 1, for each pair of layers; empty where they are merged."""
        student_heads, rule, loss, path = self.student.heads, self.rule, self.loss, self.path
        if rule in MERGED:
            return []
        if rule is None and student_heads != teacher_heads:
            named = ["first", "first-N"]
            if isinstance(self.config, AlignedLossConfig):  # else attention is copied
                merged = MERGED if self.which in ("class", "all") else ()
                named = [*merged, *named, "pairs [[student,teacher],…]"]
            raise UserError(
                f"{loss}: the teacher has {teacher_heads} heads, the student {student_heads}",
                hint=f"Choose how they meet: {setting(f'{path}.heads', named[0])}, {', '.join(named[1:])}",
            )
        if rule is None or isinstance(rule, str):
            count = int((rule or "").partition("-")[2] or min(student_heads, teacher_heads))
            if count > min(student_heads, teacher_heads):
                raise UserError(
                    f"{loss}: {path}.heads={rule}: the student has {student_heads} heads, the teacher "
                    f"{teacher_heads}; at most first-{min(student_heads, teacher_heads)}"
                )
            return [[(n, n) for n in range(1, count + 1)]] * len(self.pairs)
        if isinstance(rule, Mapping):
            layers = {student_layer for student_layer, _ in self.pairs}
            if layers != set(rule):
                raise UserError(
                    f"{loss}: {path}.heads names the student's layers {parse_ranges(sorted(rule))}, and those that "
                    f"meet are {parse_ranges(sorted(layers))}; say which with {path}.layers=[[student,teacher],…]"
                )
            head_pairs = [list(rule[student_layer]) for student_layer, _ in self.pairs]
        else:
            head_pairs = [list(rule)] * len(self.pairs)
        for student_head, teacher_head in (pair for pairs in head_pairs for pair in pairs):
            if not (1 <= student_head <= student_heads and 1 <= teacher_head <= teacher_heads):
                raise UserError(
                    f"{loss}: {path}.heads lets the student's head {student_head} meet the teacher's head "
                    f"{teacher_head}; the student has heads 1 to {student_heads}, the teacher 1 to {teacher_heads}",
                    hint=f"Give others, such as {setting(f'{path}.heads', '[[1,1]]')}",
                )
        if not head_pairs[0] or len({len(pairs) for pairs in head_pairs}) > 1:
            raise UserError(
                f"{loss}: {path}.heads gives the layers {', '.join(str(len(pairs)) for pairs in head_pairs)} pairs "
                "of heads; give each as many, at least one, and other layers a loss of their own (another name, with "
                "`type`)"
            )
        return head_pairs

    def student_heads(self) -> list[tuple[int, list[int] | None]]:
        """For each pair of layers the student's, from 1, and its heads that are compared, from 0; None for all."""
        if not self.head_pairs:
            return [(layer, None) for layer, _ in self.pairs]
        pairs = zip(self.pairs, self.head_pairs, strict=True)
        return [(layer, [head - 1 for head, _ in heads]) for (layer, _), heads in pairs]

    def of_teacher(self, target: Float[Tensor, "B _L ..."]) -> Float[Tensor, "B L ..."]:
        """The teacher's layers and heads that are compared, `[B, L, H, …]`, from a decoded target."""
        layers = [self.stored.index(layer) for _, layer in self.pairs]
        heads = [[head - 1 for _, head in pairs] for pairs in self.head_pairs]
        if not heads or all(chosen == list(range(target.shape[2])) for chosen in heads):
            return target[:, layers]
        return target[:, torch.tensor(layers)[:, None], torch.tensor(heads)]

    def kept(self, values: Tensor, side: Side, axis: int) -> Tensor:
        """The tokens that are compared, along an axis of one side's values, in the common order."""
        return values if self.all_tokens[side] else values.index_select(axis, self.get_buffer(f"{side}_tokens"))

    def _prefix_tokens(self, student: list[str], teacher: list[str]) -> tuple[list[int], list[int], list[str]]:
        """Indices of the prefix tokens that are kept on either side, and those that are left out, in words."""
        if self.which == "class":
            for side, roles in (("student", student), ("teacher", teacher)):
                if "class" not in roles:
                    problem = f"{self.loss}: the {side} has no class token, so it has no class rows"
                    raise UserError(problem, hint=f"Take a {side} that has one.")
        student_counts, teacher_counts = Counter(student), Counter(teacher)
        kept = {role for role, count in student_counts.items() if teacher_counts[role] == count}  # registers: as many
        dropped = [
            f"{side}'s {role}" + (f" ({count})" if count > 1 else "")
            for side, roles in (("student", student_counts), ("teacher", teacher_counts))
            for role, count in roles.items()
            if role not in kept
        ]
        order = [role for role in dict.fromkeys(student) if role in kept]
        student_kept, teacher_kept = (
            [i for role in order for i, r in enumerate(roles) if r == role] for roles in (student, teacher)
        )
        return student_kept, teacher_kept, dropped

    def _row(self, targets: Sequence[StoredTarget], heads: int, side: int) -> AlignmentRow:
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
        taps = " and ".join(stored.target.identity.tap for stored in targets)
        source = "" if TAPS[self.tap].values == "rows" else f" from {taps}"
        tensors = {
            "class": f"class rows{source}",
            "all": f"rows of all queries{source}",
            "scores": f"scores{source}",
            "vectors": taps,
        }[self.which]
        by_head = f", {heads} heads" if self.heads else ""
        return AlignmentRow(
            self.loss,
            targets[0].id,
            f"{tensors}, layers {parse_ranges(self.stored)}{by_head}, {side}x{side} patches",
            f"{student.layers} layers"
            + (f" x {student.heads} heads" if self.heads else "")
            + f", {student.grid}x{student.grid} patches",
            "; ".join(rule),
        )

    def _head_rule(self, heads: int) -> str:
        """How heads are compared, in words."""
        rule, temperature = self.rule, self.config.head_temperature
        if rule is None:
            return f"{heads} heads one to one"
        if isinstance(rule, str):
            return {
                "mean": "mean over heads on both sides",
                "sum": "sum over heads on both sides",
                "max": "largest over heads on both sides, rescaled",
                "min": "smallest over heads on both sides, rescaled",
                "log": "mean of logarithms over heads on both sides, "
                f"T = {f'{temperature:g}' if temperature else 'the number of heads'}",
            }.get(rule, f"the first {self.heads} heads")
        pairs_text = [", ".join(f"{a}-{b}" for a, b in pairs) for pairs in self.head_pairs]
        if not isinstance(rule, Mapping):
            return f"heads {pairs_text[0]} (student-teacher)"
        return "heads " + "; ".join(
            f"{text} of layer {layer}" for text, (layer, _) in zip(pairs_text, self.pairs, strict=True)
        )


def uniform(student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
    """(student's layer, teacher's layer), from 1: the student's l meets the teacher's round(l · N_t / N_s)."""
    return [(n, max(1, int(n * teacher_depth / student_depth + 0.5))) for n in range(1, student_depth + 1)]


def pick(layer: Float[Tensor, "B _H *rest"], heads: list[int] | None) -> Float[Tensor, "B _heads *rest"]:
    """Some heads of `[B, H, …]`, from 0; all of them as they are."""
    if heads is None or heads == list(range(layer.shape[1])):
        return layer
    return layer[:, : len(heads)] if heads == list(range(len(heads))) else layer[:, heads]
