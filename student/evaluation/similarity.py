"""Similarity of a student and a teacher: attention by Jensen-Shannon divergence, residual streams by linear CKA.

Li et al., "On the Surprising Effectiveness of Attention Transfer for Vision Transformers": Figure 5 (CKA, of Kornblith
et al., "Similarity of neural network representations revisited") and appendix B.3, Figure 7 (divergence of heads). The
teacher is what a store keeps of the images that are evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from storage.errors import UserError
from storage.policies import Policy, policy
from student.align import Shape, full, student_shape
from student.copying import copies_of
from student.evaluation.accuracy import evaluation_batches
from student.evaluation.reference import Reference
from student.evaluation_targets import evaluation_targets, kept_of
from student.lending import borrowing, lent_to
from student.loss_settings import Meeting
from student.matching import ranges, uniform
from student.model import Description
from student.rows import Rows, Vectors
from student.seen import Reads, Seen

Tokens = Literal["all", "class", "mean"]
PAIRINGS = ("direct", "bipartite", "min", "averaged")
WHERE = "similarity"  # what errors call this comparison
LARGEST = 2**25  # numbers of one tensor of attention


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence of rows `[…, N]` that sum to one, by the natural logarithm: `[…]`, at most ln 2."""
    middle = ((p + q) / 2).clamp_min(torch.finfo(p.dtype).tiny)
    return (torch.xlogy(p, p / middle) + torch.xlogy(q, q / middle)).sum(-1) / 2


class Divergences:
    """Mean divergences of all heads of a layer of the student with all of the teacher's, over images and queries."""

    def __init__(self) -> None:
        self.heads: Tensor | float = 0.0
        self.averaged: Tensor | float = 0.0
        self.images = 0

    def add(self, mine: Tensor, theirs: Tensor) -> None:
        """Take images in: rows `[B, L, H, Q, N]` of the student, with another H of the teacher."""
        each = [divergence(mine, theirs[:, :, h : h + 1]).mean(-1).sum(0) for h in range(theirs.shape[2])]
        self.heads = self.heads + torch.stack(each, -1).double().cpu()
        self.averaged = self.averaged + divergence(mine.mean(2), theirs.mean(2)).mean(-1).sum(0).double().cpu()
        self.images += len(mine)

    def told(self) -> list[dict[str, float | None]]:
        """For each pair of layers the divergence under each pairing of heads; `direct` only of as many heads."""
        assert isinstance(self.heads, Tensor)
        assert isinstance(self.averaged, Tensor)
        return [
            {**paired(matrix), "averaged": float(averaged)}
            for matrix, averaged in zip(self.heads / self.images, self.averaged / self.images, strict=True)
        ]


def paired(matrix: Tensor) -> dict[str, float | None]:
    """Divergence under the pairings of appendix B.3 that pair heads.

    Args:
        matrix: mean divergences `[H_s, H_t]`.

    Returns:
        direct: head i with head i; None where the numbers differ. bipartite: each head with one of its own, so that
        the sum is smallest; with other numbers, as many as both have. min: each of the student's with its nearest.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise UserError("pairing heads needs scipy: pip install -c constraints.txt -e '.[cpu,demo]'") from None
    same = matrix.shape[0] == matrix.shape[1]
    chosen = linear_sum_assignment(matrix.numpy())
    return {
        "direct": float(matrix.diagonal().mean()) if same else None,
        "bipartite": float(matrix[chosen].mean()),
        "min": float(matrix.amin(1).mean()),
    }


class Alignment:
    """Linear CKA of two features of the same rows, ‖X̃ᵀỸ‖² / (‖X̃ᵀX̃‖ ‖ỸᵀỸ‖) with centred columns, from sums."""

    def __init__(self) -> None:
        self.rows = 0
        self.sums: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take rows in: `[n, D]` and `[n, D']`."""
        x, y = x.double(), y.double()
        new = [x.sum(0), y.sum(0), x.T @ y, x.T @ x, y.T @ y]
        self.sums = [a + b for a, b in zip(self.sums, new, strict=True)] if self.sums else new
        self.rows += len(x)

    def value(self) -> float | None:
        """In [0, 1]; None where one side is the same for all rows."""
        x, y, xy, xx, yy = self.sums
        cross, mine, theirs = (
            (product - torch.outer(a, b) / self.rows).norm() for product, a, b in ((xy, x, y), (xx, x, x), (yy, y, y))
        )
        below = float(mine * theirs)
        least = 1e-12 * float(xx.norm() * yy.norm())  # what rounding leaves of columns that never change
        return float(cross) ** 2 / below if below > least else None


@dataclass(frozen=True)
class _Sides:
    """What of student and teacher is compared."""

    rows: Rows | None
    heads: tuple[int, int]  # of student and teacher
    vectors: Vectors | None


@torch.no_grad()
def similarity(
    model: nn.Module,
    about: Description,
    name: str,
    urls: Sequence[str],
    reference: Reference,
    *,
    tokens: Tokens = "all",
    device: torch.device | str = "cpu",
    advance: Callable[[int], None] = lambda samples: None,
) -> dict[str, Any]:
    """How similar a student and a teacher are, layer by layer, over all samples of shards.

    Layers meet as `layers: uniform` lets them, as far as the store has the teacher's; tokens that one side lacks are
    left out, and patches of another grid are resized, as for a loss (docs/papers.md).

    Args:
        model: on the device, in eval mode.
        about: how it is fed.
        name: what errors call it.
        urls: shards; labels are not read.
        reference: the teacher's targets.
        tokens: which rows CKA sees: all tokens of all images, each image's class token, or the mean of its patches.
        device: where the model is.
        advance: called with the number of samples done.

    Returns:
        `attention` and `streams`, None where the store has no such target: targets, what was compared in words, the
        numbers by layer, and their means.

    Raises:
        UserError: targets of these images are missing, with the command that makes them; nothing can be compared.
    """
    view = policy(about.evaluation, about.img_size)
    why = f"{name} is compared with {reference.teacher} on stored images"
    reference, missing = _there(reference, urls, view)
    stored = evaluation_targets(reference.store, [*reference.attention, *reference.tokens], urls, view, why)
    ids = stored.targets
    of_rows, of_tokens = ids[: len(reference.attention)], ids[len(reference.attention) :]
    sides, copied = _sides(model, reference, tokens)
    left_out = "; ".join(word for word in (missing, copied) if word)
    final = bool(of_tokens) and reference.tokens[0].target["identity"]["layers"] is None
    reads: set[Reads] = {"attention"} if sides.rows else set()
    if sides.vectors:
        reads.add("tokens" if final else "streams")
    seen = Seen(model, reads)
    divergences = Divergences()
    alignments = [Alignment() for _ in (sides.vectors.pairs if sides.vectors else ())]
    lent = lent_to(model)
    parts = evaluation_batches(urls, view, 1, stored=stored, labelled=False)
    others = evaluation_batches(urls, view, 1, stored=lent, labelled=False) if lent else None
    samples = 0
    for part in parts:
        there = part.to(device)
        with borrowing(model, there if others is None else next(others).to(device)):
            model(there.pixels(about.mean, about.std))
        if sides.rows is not None:
            _add_rows(sides, sides.rows, seen, [there.target(id) for id in of_rows], divergences)
        if sides.vectors is not None:
            streams = [seen.tokens] * sides.vectors.student.layers if final else seen.streams
            mine = sides.vectors.student_vectors(streams)
            theirs = _of_teacher(sides.vectors, there.target(of_tokens[0]), tokens)
            for n, alignment in enumerate(alignments):
                alignment.add(*(_rows_of(side[:, n], sides.vectors, tokens) for side in (mine, theirs)))
        seen.clear()
        samples += len(there.labels)
        advance(len(there.labels))
    return {
        "samples": samples, "left_out": left_out,
        "attention": sides.rows and _told(sides.rows, of_rows, divergences.told(), PAIRINGS),
        "streams": sides.vectors and {
            "tokens": tokens, "final": final,
            **_told(sides.vectors, of_tokens, [{"cka": a.value()} for a in alignments], ("cka",)),
        },
    }  # fmt: skip


def _there(reference: Reference, urls: Sequence[str], view: Policy) -> tuple[Reference, str]:
    """What the store has of these images, if it has something and nobody chose; in words what it lacks."""
    lacks = [
        bool(given) and bool(kept_of(reference.store, given, urls, view)[1])
        for given in (reference.attention, reference.tokens)
    ]
    said = "which the store has not of these images"
    if reference.chosen or lacks[0] == lacks[1]:
        return reference, ""
    if lacks[0]:
        return (replace(reference, attention=()), f"attention, {said}") if reference.tokens else (reference, "")
    return (replace(reference, tokens=()), f"tokens, {said}") if reference.attention else (reference, "")


def _sides(model: nn.Module, reference: Reference, tokens: Tokens) -> tuple[_Sides, str]:
    """What meets, and what is left out in words. Raises UserError: nothing meets, or something cannot."""
    copies = copies_of(model)
    shape = student_shape(model, attention=bool(reference.attention) and copies is None)
    if shape.each:
        raise UserError(f"{type(model).__name__} pools its patches, so its layers have no common heads and grid")
    rows = vectors = None
    heads = (shape.heads, 0)
    left_out = ""
    if reference.attention:
        first = reference.attention[0]
        pairs = _pairs(shape, reference, first.target["identity"]["layers"])
        if copies is not None and "map" in copies.parts:
            left_out = f"attention of layer(s) {ranges(copies.layers)}, which is copied"
            pairs = [pair for pair in pairs if pair[0] not in copies.layers]
        if pairs:
            heads = (shape.heads, int(first.target["sample_shape"][1]))
            every = tuple((h % heads[0] + 1, h % heads[1] + 1) for h in range(max(heads)))  # all of both sides
            which: Literal["class", "all"] = "class" if first.target["identity"]["tap"] == "class_row" else "all"
            meeting = Meeting(layers=tuple(pairs), heads=every, grid="bicubic")
            rows = Rows(WHERE, meeting, shape, reference.attention, which)
    if reference.tokens:
        (given,) = reference.tokens
        layers = given.target["identity"]["layers"]
        pairs = _pairs(shape, reference, layers) if layers else [(shape.layers, given.teacher["layers"])]
        vectors = Vectors(WHERE, Meeting(layers=tuple(pairs), grid="bicubic"), shape, reference.tokens)
        if tokens == "class" and not {"class"} <= {*shape.prefix} & {*given.teacher["prefix"]}:
            raise UserError("class tokens are compared where both sides have one; say --tokens mean, or all")
    if rows is None and vectors is None:
        raise UserError(f"nothing is left to compare: {left_out}; let the store have tokens of layers, too")
    device = next(model.parameters()).device
    return _Sides(rows and rows.to(device), heads, vectors and vectors.to(device)), left_out


def _pairs(shape: Shape, reference: Reference, stored: Sequence[int]) -> list[tuple[int, int]]:
    """Layers that meet, of those that are stored. Raises UserError: none does."""
    depth = int(reference.depth)
    wanted = uniform(shape.layers, depth)
    pairs = [pair for pair in wanted if pair[1] in stored]
    if not pairs:
        raise UserError(
            f"the student's {shape.layers} layers meet the layers {ranges([b for _, b in wanted])} of "
            f"{reference.teacher}, and the target has {ranges(stored)}; precompute some of these"
        )
    return pairs


def _add_rows(sides: _Sides, rows: Rows, seen: Seen, targets: Sequence[Tensor], divergences: Divergences) -> None:
    """Take a batch's attention in, some images at a time."""
    mine, theirs = sides.heads
    side = len(rows.get_buffer("mine"))
    several = max(1, LARGEST // (len(rows.pairs) * rows.heads * side ** (1 if rows.which == "class" else 2)))
    for start in range(0, len(targets[0]), several):
        some = slice(start, start + several)
        own = rows.student_rows([q[some] for q in seen.q], [k[some] for k in seen.k], seen.scales)[:, :, :mine]
        other = rows.teacher_rows([target[some] for target in targets])[:, :, :theirs]
        if rows.which == "class":
            own, other = own.unsqueeze(-2), other.unsqueeze(-2)
        divergences.add(own, other)


def _of_teacher(vectors: Vectors, target: Tensor, wish: Tokens) -> Tensor:
    """The teacher's tokens that meet `[B, L, N, D]`, on the student's grid where patch is compared with patch."""
    if wish == "all":
        return vectors.teacher_vectors(target)
    return vectors.kept(full(vectors.of_teacher(target)), "theirs", -2)


def _rows_of(tokens: Tensor, vectors: Vectors, wish: Tokens) -> Tensor:
    """What CKA sees of tokens `[B, N, D]`, those beside the patches first."""
    tokens = full(tokens)
    if wish == "all":
        return tokens.flatten(0, 1)
    if wish == "mean":
        return tokens[:, vectors.prefix :].mean(1)
    kept = vectors.get_buffer("mine").tolist()
    return tokens[:, kept.index(vectors.student.prefix.index("class"))]


def _told(
    side: Rows | Vectors, ids: Sequence[str], values: Sequence[dict[str, float | None]], names: Sequence[str]
) -> dict[str, Any]:
    """Numbers by layer, with their means."""
    layers = [{"student": own, "teacher": other, **told} for (own, other), told in zip(side.pairs, values, strict=True)]
    mean = {name: _mean([told[name] for told in values]) for name in names}
    rules = [rule for rule in side.row.rule.split("; ") if not rule.startswith(("layers ", "heads "))]  # told anyway
    return {"targets": list(ids), "rule": "; ".join(rules), "layers": layers, "mean": mean}


def _mean(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return math.fsum(found) / len(found) if found else None
