"""A student beside a teacher, layer by layer: their attention by its divergence, their residual streams by CKA.

Li et al., "On the Surprising Effectiveness of Attention Transfer for Vision Transformers": Figures 5 and 7. The teacher
is what a store keeps of the images that are evaluated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from precompute.taps import full
from precompute.taps.target_spec import parse_ranges
from storage.errors import UserError, setting
from student.alignment.attention import AttentionAligner
from student.alignment.matching import TokenMatching, uniform
from student.alignment.student_spec import StudentSpec, student_spec
from student.alignment.student_taps import StudentTap, StudentTaps
from student.alignment.tokens import TokenAligner
from student.attention_copy.inference import attached_to, inject_attention
from student.evaluation.batches import evaluation_batches
from student.evaluation.similarity.metrics import Divergences, LinearCKA, assignment
from student.models.attention_copy_hooks import attention_copy_hooks
from student.settings import AlignmentConfig
from student.targets.evaluation_views import evaluation_targets

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from storage.shards.shard import Shard
    from student.data.batch import Batch
    from student.evaluation.similarity.teacher_targets import TeacherTargets
    from student.models.files import StudentDescription
    from student.targets.stored_target import StoredTarget

Tokens = Literal["all", "class", "mean"]
WHERE = "similarity"  # what errors call this comparison
LARGEST = 2**25  # numbers of one tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSimilarity:
    """How similar the layers of a student and of a teacher are.

    Attributes:
        targets: ids of the teacher's targets.
        rule: in words, what was done to bring both sides together.
        pairs: layers of student and teacher that meet, counted from 1.
        values: measure -> value, for each pair; None where it is not defined.
    """

    targets: tuple[str, ...]
    rule: str
    pairs: tuple[tuple[int, int], ...]
    values: tuple[Mapping[str, float | None], ...]

    @property
    def mean(self) -> dict[str, float | None]:
        """Measure -> mean over the pairs where it is defined."""
        columns = {name: [v for each in self.values if (v := each[name]) is not None] for name in self.values[0]}
        return {name: math.fsum(column) / len(column) if column else None for name, column in columns.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        rows = zip(self.pairs, self.values, strict=True)
        layers = [{"student": student, "teacher": teacher, **values} for (student, teacher), values in rows]
        return {"targets": list(self.targets), "rule": self.rule, "layers": layers, "mean": self.mean}


@dataclass(frozen=True, slots=True, kw_only=True)
class Similarity:
    """A student beside a teacher.

    Attributes:
        samples: how many images.
        left_out: in words, what is not compared.
        attention: by Jensen-Shannon divergence; None where there is no such target.
        streams: by linear CKA; None where there is no such target.
        tokens: which rows CKA sees.
        final: whether these are tokens after the final norm, and not residual streams.
    """

    samples: int
    left_out: str
    attention: LayerSimilarity | None
    streams: LayerSimilarity | None
    tokens: Tokens
    final: bool

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        streams = self.streams and {"tokens": self.tokens, "final": self.final, **self.streams.to_json()}
        attention = self.attention and self.attention.to_json()
        return {"samples": self.samples, "left_out": self.left_out, "attention": attention, "streams": streams}


class SimilarityComparison:
    """What of a student meets what of a teacher; everything that can be refused is refused when it is made.

    Layers meet as `layers: uniform` lets them, as far as the store has the teacher's; tokens that one side lacks are
    left out, and patches of another grid are resized, as for a loss (docs/papers.md).

    Args:
        model: the student, in eval mode; what it copies is lent to it.
        about: how it is fed.
        name: what errors call it.
        shards: to read; labels are not read.
        reference: the teacher's targets.
        tokens: which rows CKA sees: all tokens of all images, each image's class token, or the mean of its patches.

    Raises:
        UserError: targets of these images are missing, with the command that makes them; nothing can be compared.
    """

    def __init__(
        self,
        model: nn.Module,
        about: StudentDescription,
        name: str,
        *,
        shards: Sequence[Shard],
        reference: TeacherTargets,
        tokens: Tokens,
    ) -> None:
        self.model, self.about, self.shards, self.tokens = model, about, shards, tokens
        self.view = about.evaluation_policy
        copies = attention_copy_hooks(model)
        shape = student_spec(model, attention=bool(reference.attention) and copies is None)
        if shape.each:
            raise UserError(f"{name}: pools its patches, so its layers have no common heads and grid to compare")
        copied = copies.layers if copies is not None and "map" in copies.parts and reference.attention else ()
        self.layers = shape.attention
        self.rows = _rows(shape, reference, copied)
        self.vectors = _vectors(shape, reference, tokens)
        left_out = f"attention of layer(s) {parse_ranges(copied)}, which is copied" if copied else ""
        self.left_out = "; ".join(filter(None, (left_out, reference.missing)))
        if self.rows is None and self.vectors is None:
            raise UserError(f"{name}: nothing is left to compare but {self.left_out}; record tokens, too")
        if self.rows is not None:
            assignment()
        attention = reference.attention if self.rows is not None else ()  # nothing is read that nothing looks at
        targets = [*attention, *reference.tokens]
        why = f"{name} is compared with {reference.teacher} on stored images"
        self.stored = evaluation_targets(reference.store, targets, shards, self.view, why=why)
        self.of_rows, self.of_tokens = self.stored.targets[: len(attention)], self.stored.targets[len(attention) :]
        self.final = bool(reference.tokens) and reference.tokens[0].target.identity.layers is None
        sizes = [math.prod(stored.target.sample_shape) for stored in targets]  # of one image's tensors
        if self.rows is not None:
            side = max(len(self.rows.get_buffer("student_tokens")), len(self.rows.get_buffer("teacher_tokens")))
            sizes.append(len(self.rows.pairs) * self.rows.heads * side ** (1 if self.rows.which == "class" else 2))
        self.batch_size = max(1, LARGEST // max(sizes))

    @torch.no_grad()
    def run(self, device: torch.device | str = "cpu", advance: Callable[[int], None] = lambda _n: None) -> Similarity:
        """The comparison over all samples.

        Args:
            device: where the model is.
            advance: called with the number of samples done.
        """
        reads: set[StudentTap] = {"attention"} if self.rows is not None else set()
        if self.vectors is not None:
            reads.add("tokens" if self.final else "streams")
        taps = StudentTaps(self.model, reads, self.layers)
        for side in filter(None, (self.rows, self.vectors)):
            side.to(device)
        divergences = Divergences()
        similarities = [LinearCKA() for _ in (self.vectors.pairs if self.vectors is not None else ())]
        readers = [
            evaluation_batches(self.shards, self.view, 1, stored=stored, labeled=False)
            for stored in (self.stored, attached_to(self.model))
            if stored is not None
        ]
        for batches in zip(*readers, strict=True):
            samples = len(batches[0].labels)
            for start in range(0, samples, self.batch_size):
                parts = [batch.part(slice(start, start + self.batch_size)).to(device) for batch in batches]
                with taps, inject_attention(self.model, parts[-1]):  # with what the student copies, where it copies any
                    self.model(parts[0].pixels(self.about.mean, self.about.std))
                if self.rows is not None:
                    divergences.add(*self._attention(self.rows, taps, parts[0]))
                if self.vectors is not None:
                    self._align(self.vectors, taps, parts[0], similarities)
                taps.clear()
            advance(samples)
        attention = _by_layer(self.rows, self.of_rows, divergences.by_layer()) if self.rows is not None else None
        cka = [{"cka": similarity.value()} for similarity in similarities]
        streams = _by_layer(self.vectors, self.of_tokens, cka) if self.vectors is not None else None
        return Similarity(
            samples=sum(map(len, self.shards)),
            left_out=self.left_out,
            attention=attention,
            streams=streams,
            tokens=self.tokens,
            final=self.final,
        )

    def _attention(self, rows: AttentionAligner, taps: StudentTaps, part: Batch) -> tuple[Tensor, Tensor]:
        """Rows `[B, L, H, Q, N]` of the student and of the teacher."""
        heads = [max(numbers) for numbers in zip(*rows.head_pairs[0], strict=True)]
        student = rows.student_rows(taps.attention)[:, :, : heads[0]]
        teacher = rows.teacher_rows([part.target(id) for id in self.of_rows])[:, :, : heads[1]]
        return (student.unsqueeze(-2), teacher.unsqueeze(-2)) if rows.which == "class" else (student, teacher)

    def _align(self, vectors: TokenAligner, taps: StudentTaps, part: Batch, similarities: Sequence[LinearCKA]) -> None:
        """Take the tokens of some images in."""
        student = vectors.student_vectors([taps.tokens] * vectors.student.layers if self.final else taps.streams)
        target = part.target(self.of_tokens[0])
        if self.tokens == "all":
            teacher = vectors.teacher_vectors(target)
        else:  # no patch meets a patch, so that of another grid none is resized
            teacher = vectors.kept(full(vectors.of_teacher(target)), "teacher", -2)
        for n, similarity in enumerate(similarities):
            similarity.add(*(_chosen(side[:, n], vectors, self.tokens) for side in (student, teacher)))


def _rows(shape: StudentSpec, reference: TeacherTargets, copied: Sequence[int]) -> AttentionAligner | None:
    """How the attention of all heads meets but in the student's layers that copy it."""
    if not reference.attention:
        return None
    first = reference.attention[0]
    pairs = tuple(pair for pair in _pairs(shape, first) if pair[0] not in copied)
    if not pairs:
        return None
    student_heads, teacher_heads = shape.heads, int(first.target.sample_shape[1])
    numbers = range(max(student_heads, teacher_heads))
    heads = tuple((n % student_heads + 1, n % teacher_heads + 1) for n in numbers)  # all of both, some of one twice
    config = AlignmentConfig(layers=pairs, heads=heads, grid="bicubic")
    tap = first.target.identity.tap
    return AttentionAligner(WHERE, config, shape, reference.attention, "class" if tap == "class_row" else "all")


def _vectors(shape: StudentSpec, reference: TeacherTargets, tokens: Tokens) -> TokenAligner | None:
    """How tokens meet."""
    if not reference.tokens:
        if tokens != "all":
            message = f"{reference.teacher} has no tokens of these images in the store"
            raise UserError(message, setting=setting("tokens", tokens))
        return None
    (stored,) = reference.tokens
    pairs = _pairs(shape, stored) if stored.target.identity.layers else [(shape.layers, stored.depth)]
    if tokens == "class" and "class" not in {*shape.prefix} & {*stored.teacher.prefix}:
        raise UserError(
            "class tokens are compared where both sides have one",
            setting=setting("tokens", "class"),
            hint=f"Give {setting('tokens', 'mean')}, or all",
        )
    return TokenAligner(WHERE, AlignmentConfig(layers=tuple(pairs), grid="bicubic"), shape, reference.tokens)


def _pairs(shape: StudentSpec, stored: StoredTarget) -> list[tuple[int, int]]:
    """Layers that meet, of those that are stored. Raises UserError: none does."""
    meeting, layers = uniform(shape.layers, stored.depth), stored.target.identity.layers or ()
    pairs = [pair for pair in meeting if pair[1] in layers]
    if not pairs:
        raise UserError(
            f"the student's {shape.layers} layers meet the layers {parse_ranges([b for _, b in meeting])} of "
            f"{stored.teacher.id}, and the target has {parse_ranges(layers)}; precompute some of these"
        )
    return pairs


def _chosen(tokens: Tensor, vectors: TokenAligner, which: Tokens) -> Tensor:
    """What CKA sees of tokens `[B, N, D]`, those beside the patches first."""
    tokens = full(tokens)
    if which == "all":
        return tokens.flatten(0, 1)
    if which == "mean":
        return tokens[:, vectors.prefix :].mean(1)
    compared = vectors.get_buffer("student_tokens").tolist()
    return tokens[:, compared.index(vectors.student.prefix.index("class"))]


def _by_layer(side: TokenMatching, ids: Sequence[str], values: Sequence[Mapping[str, float | None]]) -> LayerSimilarity:
    grid = side.student.grid
    rules = [f"the teacher's patches brought to {grid}x{grid} (bicubic)"] if side.resizes else []
    rules += [f"left out: {', '.join(side.dropped)}"] if side.dropped else []
    return LayerSimilarity(targets=tuple(ids), rule="; ".join(rules), pairs=tuple(side.pairs), values=tuple(values))
