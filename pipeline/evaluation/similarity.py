"""What `pipeline evaluate similarity` measures, prints and draws."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pipeline.evaluation.common import EvaluatedStudent, columns, number, only_set, open_student, progress
from pipeline.plotting import COLORS, FONT, GRAY, figure, panel, shortened, write
from storage.errors import UserError
from storage.store.store import Store
from student.attention_copy.inference import attach_stored_attention
from student.distributed import pick_device
from student.evaluation.similarity.compare import LayerSimilarity, Similarity, SimilarityComparison, Tokens
from student.evaluation.similarity.teacher_targets import find_teacher_targets

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# Inches.
WIDTH, HEIGHT, GAP, MARGIN, HEAD, FOOT = 2.1, 2.0, 0.3, 0.65, 0.95, 0.6
TITLES = {
    "direct": "head by head",
    "bipartite": "heads one to one, best",
    "min": "each head's nearest",
    "averaged": "mean over heads",
}
TOKENS = {"all": "all tokens", "class": "class tokens", "mean": "means of patches"}


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentSimilarity:
    """How similar a student is to a teacher."""

    student: EvaluatedStudent
    teacher: str
    similarity: Similarity

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self.student), "teacher": self.teacher, **self.similarity.to_json()}

    def lines(self) -> list[str]:
        """A table for attention, one for tokens, and what was compared."""
        similarity, lines = self.similarity, []
        if similarity.attention is not None:
            lines.append("Jensen-Shannon divergence of attention (0: the same; at most 0.693)")
            lines += _table(similarity.attention, TITLES)
        if similarity.streams is not None:
            what = "tokens after the final norm" if similarity.final else "residual streams"
            same = "1: the same but for rotation and scale"
            lines.append(f"linear CKA of {what}, {TOKENS[similarity.tokens]} ({same})")
            lines += _table(similarity.streams, {"cka": "CKA"})
        if similarity.left_out:
            lines.append(f"left out: {similarity.left_out}")
        return [*lines, f"{similarity.samples} images ({self.student.view}), teacher {self.teacher}"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SimilarityReport:
    """How similar students are to a teacher."""

    students: tuple[StudentSimilarity, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        students = [one.to_json() for one in self.students]
        return students[0] if len(students) == 1 else {"students": students}

    def lines(self) -> list[str]:
        """Tables by layer, for each student."""
        lines = []
        for one in self.students:
            lines += [*([one.student.student] if len(self.students) > 1 else []), *one.lines()]
        return lines

    def picture(self) -> Any:
        """A matplotlib figure: a panel for each pairing of heads and one for CKA, a line for each student."""
        students = self.students
        panels = [("attention", measure, title) for measure, title in TITLES.items()]
        panels.append(("streams", "cka", "CKA of streams"))
        curves = {}
        for part, measure, title in panels:
            lines = [_curve(getattr(one.similarity, part), measure) for one in students]
            if any(values for _, values in lines):
                curves[part, title] = lines
        apart = GAP + 0.25  # between divergences and CKA, whose numbers are others
        width = max(MARGIN + len(curves) * (WIDTH + GAP) + apart, 6.0)
        legend = 0.22 * len(students)
        drawn = figure(width, HEAD + legend + HEIGHT + FOOT)
        write(drawn, MARGIN / 2, 0.15, f"Students beside {shortened(students[0].teacher, 40)}, by layer", weight="bold")
        colors = [COLORS[n % len(COLORS)] for n in range(len(students))]
        for n, one in enumerate(students):
            name = shortened(one.student.student, 70)
            write(drawn, MARGIN / 2, 0.42 + 0.22 * n, name, color=colors[n], weight="bold")
        for at, ((part, title), lines) in enumerate(curves.items()):
            left = MARGIN + at * (WIDTH + GAP) + (apart if part == "streams" and at else 0)
            axes = panel(drawn, left, HEAD + legend, WIDTH, HEIGHT)
            axes.set_title(title, fontsize=FONT - 0.5, color=GRAY)
            for color, (layers, values) in zip(colors, lines, strict=True):
                axes.plot(layers, values, "o-", markersize=4, color=color)
            axes.set_xlabel("student's layer", fontsize=FONT - 1, color=GRAY)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_ylim(0, 0.7 if part == "attention" else 1.02)
            if at == 0 and part == "attention":
                axes.set_ylabel("JS divergence", fontsize=FONT - 1, color=GRAY)
            elif part == "attention":
                axes.set_yticklabels([])
        return drawn


def _table(layers: LayerSimilarity, titles: dict[str, str]) -> list[str]:
    names = [*(f"{student}-{teacher}" for student, teacher in layers.pairs), "mean"]
    by_name = zip(names, [*layers.values, layers.mean], strict=True)
    rows = [(name, *(number(values[measure], 3) for measure in titles)) for name, values in by_name]
    notes = ": ".join(word for word in (", ".join(layers.targets), layers.rule) if word)
    return [*columns([("layers", *titles.values()), *rows]), notes]


def measure_similarity(
    paths: Sequence[Path],
    *,
    shards: Sequence[str],
    store: str,
    teacher: str | None,
    targets: Sequence[str],
    tokens: Tokens,
    device: str,
) -> SimilarityReport:
    """How similar students are to a teacher in a store.

    Args:
        paths: the students' files.
        shards: patterns of them; labels are not read.
        store: with the teacher's targets.
        teacher: its name; None where the store has one.
        targets: ids of the targets to compare with, where several fit.
        tokens: which tokens of an image are compared.
        device: as on the command line.
    """
    opened, torch_device, opened_store = only_set(shards), pick_device(device), Store.open(store)
    comparisons = []
    for path in paths:
        member, student = open_student(path, torch_device)
        model, about = member.model, member.about
        reference = find_teacher_targets(opened_store, teacher, targets, opened, about.evaluation_policy)
        if about.attention_copy is not None:
            copied_from = _existing_store(about.attention_copy.store, store)
            attach_stored_attention(model, about, copied_from, opened)
        comparison = SimilarityComparison(model, about, member.name, shards=opened, reference=reference, tokens=tokens)
        comparisons.append((student, reference.teacher, comparison))
    with progress("comparing", len(comparisons) * sum(map(len, opened))) as advance:
        students = tuple(
            StudentSimilarity(student=student, teacher=name, similarity=comparison.run(torch_device, advance))
            for student, name, comparison in comparisons
        )
    return SimilarityReport(students=students)


def _existing_store(recorded: str, fallback: str) -> str:
    """Where a copying student's teacher is: where it was trained or, if there is no store any more, the fallback."""
    try:
        return Store.open(recorded).url
    except UserError:
        return fallback


def _curve(layers: LayerSimilarity | None, measure: str) -> tuple[list[int], list[float]]:
    """The student's layers and their values, where these are defined."""
    if layers is None:
        return [], []
    by_pair = zip(layers.pairs, layers.values, strict=True)
    defined = {student: value for (student, _), values in by_pair if (value := values[measure]) is not None}
    return [*defined], [*defined.values()]
