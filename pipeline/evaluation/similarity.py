"""What `pipeline evaluate similarity` measures, prints and draws."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pipeline.console import Console
from pipeline.evaluation.common import EvaluatedStudent, columns, only_set, open_student
from pipeline.plotting import COLORS, FONT, GRAY, figure, panel, picture_path, save, shortened, write
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
        found, lines = self.similarity, []
        if found.attention is not None:
            lines.append("Jensen-Shannon divergence of attention (0: the same; at most 0.693)")
            lines += _table(found.attention, TITLES)
        if found.streams is not None:
            what = "tokens after the final norm" if found.final else "residual streams"
            same = "1: the same but for rotation and scale"
            lines.append(f"linear CKA of {what}, {TOKENS[found.tokens]} ({same})")
            lines += _table(found.streams, {"cka": "CKA"})
        if found.left_out:
            lines.append(f"left out: {found.left_out}")
        return [*lines, f"{found.samples} images ({self.student.view}), teacher {self.teacher}"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SimilarityReport:
    """How similar students are to a teacher, and a picture, where one was asked for."""

    students: tuple[StudentSimilarity, ...]
    files: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        students = [one.to_json() for one in self.students]
        result = students[0] if len(students) == 1 else {"students": students}
        return {**result, **({"files": list(self.files)} if self.files else {})}

    def lines(self) -> list[str]:
        """Tables by layer, for each student."""
        lines = []
        for one in self.students:
            lines += [*([one.student.student] if len(self.students) > 1 else []), *one.lines()]
        return [*lines, *(f"written: {file}" for file in self.files)]


def _table(layers: LayerSimilarity, titles: dict[str, str]) -> list[str]:
    named = [
        (f"{student}-{teacher}", values) for (student, teacher), values in zip(layers.pairs, layers.values, strict=True)
    ]
    rows = [
        (name, *(_number(values[measure]) for measure in titles)) for name, values in [*named, ("mean", layers.mean)]
    ]
    notes = ": ".join(word for word in (", ".join(layers.targets), layers.rule) if word)
    return [*columns([("layers", *titles.values()), *rows]), notes]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def measure_similarity(
    paths: Sequence[Path],
    *,
    shards: Sequence[str],
    store: str,
    teacher: str | None,
    targets: Sequence[str],
    tokens: Tokens,
    out: Path | None,
    device: str,
) -> SimilarityReport:
    """How similar students are to a teacher in a store, and a picture where a place for it is given.

    Args:
        paths: the students' files.
        shards: patterns of them; labels are not read.
        store: with the teacher's targets.
        teacher: its name; None where the store has one.
        targets: ids of the targets to compare with, where several fit.
        tokens: which tokens of an image are compared.
        out: of the picture.
        device: as on the command line.
    """
    file = picture_path(out) if out is not None else None
    opened_shards = only_set(shards)
    torch_device, console = pick_device(device), Console()
    opened = Store.open(store)
    comparisons = []
    for path in paths:
        member, student = open_student(path, torch_device, console)
        view = member.about.evaluation_policy
        reference = find_teacher_targets(opened, teacher, targets, opened_shards, view)
        if member.about.attention_copy is not None:
            copied_from = store_of(member.about.attention_copy.store, store)
            attach_stored_attention(member.model, member.about, copied_from, opened_shards)
        comparison = SimilarityComparison(
            member.model, member.about, member.name, shards=opened_shards, reference=reference, tokens=tokens
        )
        comparisons.append((student, reference.teacher, comparison))
    console.start("comparing", len(comparisons) * sum(map(len, opened_shards)))
    try:
        students = tuple(
            StudentSimilarity(student=student, teacher=name, similarity=comparison.run(torch_device, console.advance))
            for student, name, comparison in comparisons
        )
    finally:
        console.stop()
    if file is not None:
        save(picture(students), file)
    return SimilarityReport(students=students, files=(str(file),) if file is not None else ())


def store_of(recorded: str, given: str) -> str:
    """Where a copying student's teacher is: where it was trained or, if there is no store any more, the given one."""
    try:
        return Store.open(recorded).url
    except UserError:
        return given


def picture(students: Sequence[StudentSimilarity]) -> Any:
    """A matplotlib figure: a panel for each pairing of heads and one for CKA, a line for each student."""
    panels = [("attention", measure, title) for measure, title in TITLES.items()] + [
        ("streams", "cka", "CKA of streams")
    ]
    curves = {
        (part, title): [_curve(getattr(one.similarity, part), measure) for one in students]
        for part, measure, title in panels
    }
    curves = {panel: lines for panel, lines in curves.items() if any(values for _, values in lines)}
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


def _curve(layers: LayerSimilarity | None, measure: str) -> tuple[list[int], list[float]]:
    """The student's layers and their values, where these are defined."""
    if layers is None:
        return [], []
    values = {student: values[measure] for (student, _), values in zip(layers.pairs, layers.values, strict=True)}
    defined = {student: value for student, value in values.items() if value is not None}
    return [*defined], [*defined.values()]
