"""What `pipeline evaluate similarity` measures: students beside a teacher, as data, as tables, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.console import Console
from pipeline.evaluation.common import Said, columns, only_set_of, opened
from pipeline.plotting import COLOURS, FONT, GREY, figure, panel, picture_path, save, shortened, write
from storage.errors import UserError
from storage.shards.index import cached_index
from storage.store.store import Store
from storage.views.policy import policy
from student.attention_copy.inference import attach_stored_attention
from student.distributed import pick_device
from student.evaluation.similarity.compare import SimilarityComparison, Tokens
from student.evaluation.similarity.metrics import PAIRINGS
from student.evaluation.similarity.teacher_targets import find_teacher_targets

# Inches.
WIDTH, HEIGHT, GAP, MARGIN, HEAD, FOOT = 2.1, 2.0, 0.3, 0.65, 0.95, 0.6
TITLES = {
    "direct": "head by head", "bipartite": "heads one to one, best", "min": "each head's nearest",
    "averaged": "mean over heads",
}  # fmt: skip
TOKENS = {"all": "all tokens", "class": "class tokens", "mean": "means of patches"}


def measure_similarity(
    paths: Sequence[Path],
    patterns: Sequence[str],
    store: str,
    *,
    teacher: str | None,
    targets: Sequence[str],
    tokens: Tokens,
    out: Path | None,
    device: str,
) -> Said:
    """How similar students are to a teacher in a store, and a picture where a place for it is given."""
    file = picture_path(out) if out is not None else None
    urls = only_set_of(patterns)
    where, console = pick_device(device), Console()
    place = Store.open(store)
    members, answers = map(list, zip(*(opened(path, where, console) for path in paths), strict=True))
    comparisons = []
    for member, answer in zip(members, answers, strict=True):
        view = policy(member.about.evaluation, member.about.img_size)
        reference = find_teacher_targets(place, teacher, targets, urls, view)
        answer["teacher"] = reference.teacher
        if member.about.attention_copy is not None:
            copied_from = store_of(member.about.attention_copy["store"], store)
            attach_stored_attention(member.model, member.about, copied_from, urls)
        comparisons.append(SimilarityComparison(member.model, member.about, member.name, urls, reference, tokens))
    console.start("comparing", len(members) * sum(len(cached_index(url)) for url in urls))
    try:
        for comparison, answer in zip(comparisons, answers, strict=True):
            answer |= comparison.run(where, console.advance)
    finally:
        console.stop()
    lines = [line for answer in answers for line in _lines(answer, titled=len(answers) > 1)]
    result = answers[0] if len(answers) == 1 else {"students": answers}
    if file is not None:
        save(picture(answers), file)
        result["files"] = [str(file)]
        lines.append(f"written: {file}")
    return result, lines


def store_of(recorded: str, given: str) -> str:
    """Where a copying student's teacher is: where it learned or, where no store is any more, the given one."""
    try:
        return Store.open(recorded).url
    except UserError:
        return given


def _lines(answer: dict[str, Any], *, titled: bool) -> list[str]:
    lines = [answer["student"]] if titled else []
    for part, names in (("attention", PAIRINGS), ("streams", ("cka",))):
        told = answer[part]
        if told is None:
            continue
        if part == "attention":
            lines.append("Jensen-Shannon divergence of attention (0: the same; at most 0.693)")
            heads = tuple(TITLES[name] for name in names)
        else:
            what = "tokens after the final norm" if told["final"] else "residual streams"
            lines.append(f"linear CKA of {what}, {TOKENS[told['tokens']]} (1: the same but for rotation and scale)")
            heads = ("CKA",)
        rows = [(f"{row['student']}-{row['teacher']}", *(_number(row[n]) for n in names)) for row in told["layers"]]
        rows.append(("mean", *(_number(told["mean"][name]) for name in names)))
        lines += [
            *columns([("layers", *heads), *rows]),
            ": ".join(word for word in (", ".join(told["targets"]), told["rule"]) if word),
        ]
    if answer["left_out"]:
        lines.append(f"left out: {answer['left_out']}")
    lines.append(f"{answer['samples']} images ({answer['view']}), teacher {answer['teacher']}")
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def picture(answers: Sequence[dict[str, Any]]) -> Any:
    """A matplotlib figure: a panel for each pairing of heads and one for CKA, a line for each student."""
    shown = [("attention", name, title) for name, title in TITLES.items()]
    shown += [("streams", "cka", "CKA of streams")]
    shown = [
        (part, name, title)
        for part, name, title in shown
        if any(answer[part] and answer[part]["mean"][name] is not None for answer in answers)
    ]
    apart = GAP + 0.25  # between divergences and CKA, whose numbers are others
    width = max(MARGIN + len(shown) * (WIDTH + GAP) + apart, 6.0)
    legend = 0.22 * len(answers)
    drawn = figure(width, HEAD + legend + HEIGHT + FOOT)
    write(drawn, MARGIN / 2, 0.15, f"Students beside {shortened(answers[0]['teacher'], 40)}, by layer", weight="bold")
    for n, answer in enumerate(answers):
        write(drawn, MARGIN / 2, 0.42 + 0.22 * n, shortened(answer["student"], 70), color=COLOURS[n % len(COLOURS)],
              weight="bold")  # fmt: skip
    for at, (part, name, title) in enumerate(shown):
        left = MARGIN + at * (WIDTH + GAP) + (apart if part == "streams" and at else 0)
        axes = panel(drawn, left, HEAD + legend, WIDTH, HEIGHT)
        axes.set_title(title, fontsize=FONT - 0.5, color=GREY)
        for n, answer in enumerate(answers):
            rows = [row for row in (answer[part] or {"layers": []})["layers"] if row[name] is not None]
            axes.plot([row["student"] for row in rows], [row[name] for row in rows], "o-", markersize=4,
                      color=COLOURS[n % len(COLOURS)])  # fmt: skip
        axes.set_xlabel("student's layer", fontsize=FONT - 1, color=GREY)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylim(0, 0.7 if part == "attention" else 1.02)
        if at == 0 and part == "attention":
            axes.set_ylabel("JS divergence", fontsize=FONT - 1, color=GREY)
        elif part == "attention":
            axes.set_yticklabels([])
    return drawn
