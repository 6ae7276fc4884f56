"""What `pipeline evaluate localize` measures, prints and draws."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pipeline.evaluation.common import EvaluatedStudent, columns, number, only_set, open_student, progress
from pipeline.plotting import COLORS, FONT, GRAY, MAP, figure, panel, shortened, write
from student.distributed import pick_device
from student.evaluation.localization.localize import ClassAttention, Localization, localize
from student.evaluation.localization.max_box_acc import OVERLAPS, SIDE, BoxAccuracies, Convention, means

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# Inches.
CELL, GAP, MARGIN, HEAD, NOTE = 1.9, 0.25, 0.3, 0.95, 0.3
PAIRS = 2  # images in a row, each beside its map


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalizationReport:
    """How well a student's attention finds objects.

    Attributes:
        student: that was evaluated.
        maps: in words, which maps its boxes are drawn around.
        box: where predicted boxes end.
        localization: the metrics.
    """

    student: EvaluatedStudent
    maps: str
    box: Convention
    localization: Localization

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            **asdict(self.student),
            "view": "resize",
            "maps": self.maps,
            "box": self.box,
            **self.localization.metrics.to_json(),
            "samples": self.localization.samples,
            "without_box": self.localization.without_box,
        }

    def lines(self) -> list[str]:
        """A table of accuracies by IoU."""
        metrics, without_box = self.localization.metrics, self.localization.without_box
        kinds: dict[str, BoxAccuracies] = {
            "largest contour (MaxBoxAcc)": metrics.v1,
            "all contours (V2)": metrics.v2,
            "centered box": metrics.center,
        }
        rows = [("right, %, at IoU", *map(str, OVERLAPS), *(f"[{overlaps}]" for overlaps in means(metrics.v1)))]
        for text, accuracies in kinds.items():
            each = [accuracies[overlap].accuracy for overlap in OVERLAPS]
            rows.append((text, *map(number, [*each, *means(accuracies).values()])))
        skipped = f", {without_box} without a box skipped" if without_box else ""
        return [
            *columns(rows),
            f"{self.maps}; {self.box} boxes; each at the threshold, or the size, that is best for the whole set; "
            f"{self.localization.samples} images{skipped}",
        ]

    def picture(self) -> Any:
        """A matplotlib figure: images with true and predicted boxes, each beside its map."""
        images = self.localization.images
        rows = -(-len(images) // PAIRS)
        width = 2 * MARGIN + PAIRS * (2 * CELL + GAP) + GAP + 0.7
        drawn = figure(width, HEAD + rows * (CELL + NOTE + GAP) - NOTE - GAP + MARGIN)
        level = f"predicted (dashed): map above {self.localization.metrics.v1[0.5].threshold:.3g} of its maximum"
        write(drawn, MARGIN, MARGIN / 2, f"Where {shortened(self.student.name, 60)} looks", weight="bold")
        write(drawn, MARGIN, MARGIN / 2 + 0.25, "true box", color=COLORS[4], weight="bold")
        write(drawn, MARGIN + 1.0, MARGIN / 2 + 0.25, level, color=COLORS[1], weight="bold")
        image = None
        for n, one in enumerate(images):
            left = MARGIN + (n % PAIRS) * (2 * CELL + 2 * GAP)
            top = HEAD + (n // PAIRS) * (CELL + NOTE + GAP)
            caption = f"{shortened(one.image.key, 28)}, IoU {one.overlap:.2f}"
            write(drawn, left, top - NOTE + 0.03, caption, color=GRAY, fontsize=FONT - 1)
            for column in range(2):
                axes = panel(drawn, left + column * CELL, top, CELL - 0.05, CELL - 0.05)
                axes.set(xticks=[], yticks=[])
                if column:
                    image = axes.imshow(one.map / 255, cmap=MAP, vmin=0, vmax=1)
                else:
                    axes.imshow(one.image.pixels, extent=(-0.5, SIDE - 0.5, SIDE - 0.5, -0.5))
                for box in one.image.boxes:
                    _draw(axes, box, COLORS[4], "-")
                _draw(axes, one.box, COLORS[1], "--")
        bar = panel(drawn, width - MARGIN - 0.65, HEAD, 0.15, CELL - 0.05)
        drawn.colorbar(image, cax=bar).set_label("attention, of its maximum", color=GRAY, fontsize=FONT - 1)
        return drawn


def measure_localization(
    path: Path, *, shards: Sequence[str], convention: Convention, device: str
) -> LocalizationReport:
    """MaxBoxAcc of one student."""
    opened_shards, torch_device = only_set(shards), pick_device(device)
    member, student = open_student(path, torch_device)
    attention = ClassAttention(member.model, member.name)
    with progress("localizing", sum(map(len, opened_shards))) as advance:
        result = localize(
            attention, member.about, opened_shards, convention, device=torch_device, keep_images=True, advance=advance
        )
    return LocalizationReport(student=student, maps=attention.text, box=convention, localization=result)


def _draw(axes: Any, box: Any, color: str, style: str) -> None:
    """A box around its first and last pixels, on a white line that shows on any ground."""
    left, top, right, bottom = box
    corners = ([left, right, right, left, left], [top, top, bottom, bottom, top])
    axes.plot(*corners, color="white", linewidth=3.2, scalex=False, scaley=False)
    axes.plot(*corners, color=color, linewidth=1.8, linestyle=style, scalex=False, scaley=False)
