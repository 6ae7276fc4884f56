"""Which layers, heads and tokens of teacher and student are compared, decided once for every loss."""

from __future__ import annotations

import math
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
from student.targets.stored_target import StoredTarget, Targets

Which = Literal["class", "all", "scores", "vectors"]
Side = Literal["student", "teacher"]

MERGED = ("mean", "sum", "max", "min", "log")  # rules by which all heads of a side become one


class LayerMatching(nn.Module):
    """Which layers, or stages, of a target are compared with which of the student's.

    Args:
        loss: name of the loss, or `attention_copy`, for errors.
        config: what the recipe states.
        student: the student's shape.
        targets: one target of some tap with layers, or several of one teacher and the same layers.

    Attributes:
        pairs: (student's layer, teacher's layer), from 1.
        tap: of the first target.
        stored: the teacher's layers that the target holds; those of `pairs` are among them.
        widths: (student's, teacher's) of the vectors of each pair, where vectors are compared.
        vector: what these are, in words.

    Raises:
        UserError: what differs and was not stated, or is not there.
    """

    widths: list[tuple[int, int]]
    vector = "each place of a map"

    def __init__(self, loss: str, config: AlignmentConfig, student: StudentSpec, targets: Targets) -> None:
        super().__init__()
        self.loss, self.config, self.student = loss, config, student
        self.path = settings_path(loss)
        first = targets[0].target
        self.tap = first.identity.tap
        # tokens without layers are those after the final norm
        self.stored = [*(first.identity.layers or [targets[0].depth])]
        self.pairs = self._layers(targets[0].depth)

    def _layers(self, teacher: int) -> list[tuple[int, int]]:
        """(student's layer, teacher's layer), from 1, for a teacher of so many layers."""
        layers, student, path = self.config.layers, self.student.layers, f"{self.path}.layers"
        if layers is None:
            if student != teacher:
                raise UserError(
                    f"{self.loss}: the teacher has {teacher} layers, the student {student}",
                    hint=f"Choose which layers meet: {setting(path, 'uniform')}, last, first-N, last-N, or "
                    "pairs [[1,2],[2,4]]",
                )
            if self.stored != list(range(1, teacher + 1)):
                raise UserError(
                    f"{self.loss}: the target holds the teacher's layers {parse_ranges(self.stored)} of {teacher}",
                    hint=f"Choose which of the student's layers meet them: {setting(path, 'last')}, "
                    "first-N, last-N, or pairs [[student,teacher],…]",
                )
            pairs = [(n, n) for n in range(1, student + 1)]
        elif layers == "uniform":
            pairs = uniform(student, teacher)
        elif isinstance(layers, str):
            count = self._count("layers", layers, student, teacher, default=1)
            before = (0, 0) if layers.startswith("first") else (student - count, teacher - count)
            pairs = [(before[0] + n, before[1] + n) for n in range(1, count + 1)]
        else:
            pairs = [*layers]
        if not pairs:
            raise UserError(f"{self.loss}: {path} is empty")
        self._require_within("layer", pairs, student, teacher, f"{setting(path, 'uniform')}, last, or other pairs")
        for student_layer, teacher_layer in pairs:
            if teacher_layer not in self.stored:
                raise UserError(
                    f"{self.loss}: the student's layer {student_layer} meets the teacher's layer {teacher_layer}, and "
                    f"the target holds {parse_ranges(self.stored)}; precompute "
                    f"layers={parse_ranges(sorted({layer for _, layer in pairs}))}"
                )
        return pairs

    def _count(self, unit: str, rule: str, student: int, teacher: int, default: int) -> int:
        """N of `first-N` or `last-N` layers or heads."""
        end, _, number = rule.partition("-")
        count, both = int(number or default), min(student, teacher)
        if count > both:
            uniform_too = ", or uniform" if unit == "layers" else ""
            raise UserError(
                f"{self.loss}: {self.path}.{unit}={rule}: the student has {student} {unit}, the teacher {teacher}; "
                f"at most {end}-{both}{uniform_too}"
            )
        return count

    def _require_within(
        self, unit: str, pairs: Sequence[tuple[int, int]], student: int, teacher: int, others: str
    ) -> None:
        """Refuse pairs of layers or heads that are not there."""
        for a, b in pairs:
            if not (1 <= a <= student and 1 <= b <= teacher):
                raise UserError(
                    f"{self.loss}: {self.path}.{unit}s lets the student's {unit} {a} meet the teacher's {unit} {b}; "
                    f"the student has {unit}s 1 to {student}, the teacher 1 to {teacher}",
                    hint=f"Give {others}",
                )

    def register_resize(self, side: int, grid: int, target: str, buffer: str) -> None:
        """Keep the matrix that brings the teacher's patches to the student's grid, where theirs is another.

        Raises:
            UserError: it is not to be resized.
        """
        if side == grid:
            return
        if self.config.grid is None:
            raise UserError(
                f"{self.loss}: target {target} has a grid of {side}x{side}, the student's patches make {grid}x{grid}",
                hint=f"Resize the teacher's: {setting(f'{self.path}.grid', 'bicubic')}",
            )
        matrix = resize_matrix(side, grid)
        self.register_buffer(buffer, torch.kron(matrix, matrix), persistent=False)

    def require_widths(self, hint: str) -> None:
        """Refuse vectors of other widths. Raises UserError: both widths, and the hint."""
        for (layer, _), (student, teacher) in zip(self.pairs, self.widths, strict=True):
            if student != teacher:
                widths = f"{teacher} in the teacher, {student} in layer {layer} of the student"
                raise UserError(f"{self.loss}: the width of {self.vector} is {widths}", hint=hint)


class TokenMatching(LayerMatching):
    """Which layers, heads and tokens of a target are compared with which of the student's.

    Arguments as for `LayerMatching`, and:

    Args:
        which: class rows, rows of all queries, scores (whose softmax the rows are), or vectors of all tokens.

    Attributes:
        heads: how many are compared; 1 where they are merged, 0 where the tap has none.
        head_pairs: (student's head, teacher's head), from 1, for each pair of layers; empty where they are merged.
        rule: how heads are compared: as `AlignmentConfig.heads`, with `auto` decided.
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
        self, loss: str, config: AlignmentConfig, student: StudentSpec, targets: Targets, which: Which
    ) -> None:
        super().__init__(loss, config, student, targets)
        self.which = which
        first, teacher = targets[0], targets[0].teacher
        shape, axes, side = first.target.sample_shape, TAPS[self.tap].axes, patch_grid(loss, first)
        teacher_heads = int(shape[1]) if "head" in axes else 0
        self.rule = config.heads
        if config.heads == "auto":
            self.rule = None if teacher_heads in (0, student.heads) else "log"
        self.head_pairs = self._heads(teacher_heads) if teacher_heads else []
        self.heads = len(self.head_pairs[0]) if self.head_pairs else int(teacher_heads > 0)
        roles: dict[Side, Sequence[str]] = {"student": student.prefix, "teacher": teacher.prefix}
        prefix, self.dropped = self._prefix_tokens(roles)
        grids: dict[Side, int] = {"student": student.grid, "teacher": side}
        self.all_tokens: dict[Side, bool] = {}
        for name, grid in grids.items():
            count = len(roles[name])
            tokens = torch.tensor([*prefix[name], *range(count, count + grid**2)])
            self.register_buffer(f"{name}_tokens", tokens, persistent=False)
            self.all_tokens[name] = prefix[name] == [*range(count)]
        self.prefix = len(prefix["student"])
        self.class_query = teacher.prefix.index("class") if "class" in teacher.prefix else 0
        self.resizes = side != student.grid
        self.register_resize(side, student.grid, first.id, "resize")
        self.row = self._row(targets, teacher_heads, side)

    def _heads(self, teacher: int) -> list[list[tuple[int, int]]]:
        """(student's head, teacher's head), from 1, for each pair of layers; empty where they are merged."""
        rule, student, path = self.rule, self.student.heads, f"{self.path}.heads"
        if rule in MERGED:
            return []
        if rule is None and student != teacher:
            rules = ["first", "first-N"]
            if isinstance(self.config, AlignedLossConfig):  # else attention is copied
                merged = MERGED if self.which in ("class", "all") else ()
                rules = [*merged, *rules, "pairs [[student,teacher],…]"]
            hint = f"Choose how they meet: {setting(path, rules[0])}, {', '.join(rules[1:])}"
            raise UserError(f"{self.loss}: the teacher has {teacher} heads, the student {student}", hint=hint)
        if rule is None or isinstance(rule, str):
            count = self._count("heads", rule or "", student, teacher, default=min(student, teacher))
            return [[(n, n) for n in range(1, count + 1)]] * len(self.pairs)
        layers = [layer for layer, _ in self.pairs]
        if isinstance(rule, Mapping) and {*layers} != {*rule}:
            raise UserError(
                f"{self.loss}: {path} names the student's layers {parse_ranges(sorted(rule))}, and those that meet are "
                f"{parse_ranges(sorted({*layers}))}; choose them with {self.path}.layers=[[student,teacher],…]"
            )
        head_pairs = [list(rule[layer] if isinstance(rule, Mapping) else rule) for layer in layers]
        all_pairs = [pair for pairs in head_pairs for pair in pairs]
        self._require_within("head", all_pairs, student, teacher, f"others, such as {setting(path, '[[1,1]]')}")
        if not head_pairs[0] or len({len(pairs) for pairs in head_pairs}) > 1:
            raise UserError(
                f"{self.loss}: {path} gives the layers {', '.join(str(len(pairs)) for pairs in head_pairs)} pairs of "
                "heads; give each as many, at least one, and other layers a loss of their own (another name, with "
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

    def resized(self, vectors: Float[Tensor, "*axes _N d"]) -> Float[Tensor, "*axes N d"]:
        """The teacher's patches on the student's grid, the tokens before them as they are."""
        patches = self.get_buffer("resize") @ vectors[..., self.prefix :, :]
        return torch.cat([vectors[..., : self.prefix, :], patches], -2)

    def _prefix_tokens(self, prefix: Mapping[Side, Sequence[str]]) -> tuple[dict[Side, list[int]], list[str]]:
        """Indices of the prefix tokens that are kept on either side, and those that are left out, in words."""
        for side, roles in prefix.items():
            if self.which == "class" and "class" not in roles:
                problem = f"{self.loss}: the {side} has no class token, so it has no class rows"
                raise UserError(problem, hint=f"Take a {side} that has one.")
        counts = {side: Counter(roles) for side, roles in prefix.items()}
        common = [role for role, count in counts["student"].items() if counts["teacher"][role] == count]
        dropped = [
            f"{side}'s {role}" + (f" ({count})" if count > 1 else "")
            for side, by_role in counts.items()
            for role, count in by_role.items()
            if role not in common  # as registers, unless both have as many
        ]
        tokens: dict[Side, list[int]] = {}
        for side, roles in prefix.items():
            tokens[side] = [i for role in common for i, r in enumerate(roles) if r == role]
        return tokens, dropped

    def _row(self, targets: Targets, heads: int, side: int) -> AlignmentRow:
        student, are_rows = self.student, self.which in ("class", "all")
        rule = [f"layers {', '.join(f'{a}-{b}' for a, b in self.pairs)} (student-teacher)"]
        if self.heads:
            rule.append(self._head_rule(heads))
        if self.resizes:
            mass = ", mass kept" if are_rows else ""
            rule.append(f"patches {side}x{side} to {student.grid}x{student.grid} (bicubic{mass})")
        if self.dropped:
            rescaled = ", the rest rescaled" if are_rows else ""
            rule.append(f"left out{rescaled}: {', '.join(self.dropped)}")
        taps = " and ".join(stored.target.identity.tap for stored in targets)
        source = "" if TAPS[self.tap].values == "rows" else f" from {taps}"
        names = {"class": "class rows", "all": "rows of all queries", "scores": "scores"}
        tensors = names[self.which] + source if self.which in names else taps
        by_head, by_student_head = (f", {heads} heads", f" x {student.heads} heads") if self.heads else ("", "")
        return AlignmentRow(
            self.loss,
            targets[0].id,
            f"{tensors}, layers {parse_ranges(self.stored)}{by_head}, {side}x{side} patches",
            f"{student.layers} layers{by_student_head}, {student.grid}x{student.grid} patches",
            "; ".join(rule),
        )

    def _head_rule(self, heads: int) -> str:
        """How heads are compared, in words."""
        rule, temperature = self.rule, self.config.head_temperature
        if rule is None:
            return f"{heads} heads one to one"
        if isinstance(rule, str):
            log = f"T = {f'{temperature:g}' if temperature else 'the number of heads'}"
            return {
                "mean": "mean over heads on both sides",
                "sum": "sum over heads on both sides",
                "max": "largest over heads on both sides, rescaled",
                "min": "smallest over heads on both sides, rescaled",
                "log": f"mean of logarithms over heads on both sides, {log}",
            }.get(rule, f"the first {self.heads} heads")
        pairs_text = [", ".join(f"{a}-{b}" for a, b in pairs) for pairs in self.head_pairs]
        if not isinstance(rule, Mapping):
            return f"heads {pairs_text[0]} (student-teacher)"
        by_layer = zip(pairs_text, self.pairs, strict=True)
        return "heads " + "; ".join(f"{text} of layer {layer}" for text, (layer, _) in by_layer)


def patch_grid(loss: str, stored: StoredTarget) -> int:
    """Side of the grid of a target's patches. Raises UserError: they make no square."""
    target = stored.target
    patches = target.sample_shape[TAPS[target.identity.tap].axes.index("token")] - len(stored.teacher.prefix)
    side = math.isqrt(max(0, patches))
    if side * side != patches:
        raise UserError(f"{loss}: target {stored.id}: {patches} patches make no square grid")
    return side


def uniform(student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
    """(student's layer, teacher's layer), from 1: the student's l meets the teacher's round(l · N_t / N_s)."""
    return [(n, max(1, int(n * teacher_depth / student_depth + 0.5))) for n in range(1, student_depth + 1)]


def pick(layer: Float[Tensor, "B _H *rest"], heads: list[int] | None) -> Float[Tensor, "B _heads *rest"]:
    """Some heads of `[B, H, …]`, from 0; all of them as they are."""
    if heads is None or heads == list(range(layer.shape[1])):
        return layer
    return layer[:, : len(heads)] if heads == list(range(len(heads))) else layer[:, heads]
