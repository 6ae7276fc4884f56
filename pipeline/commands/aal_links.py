"""`pipeline aal-links`: the links between a student and its CNN teacher, and those that Algorithm 1 keeps."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import click

from pipeline.console import show
from pipeline.options import PATH, choice, common, picture

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from student.losses.parts.aal_links import Trained
    from student.settings import LinksConfig


@click.command()
@click.argument("run", type=PATH)
@click.option("--loss", metavar="NAME", help="The aal loss to read, if the run has several.")
@picture()
@choice("--normalize", values=["abs", "printed"], text="Normalize magnitudes, or signed links as printed in the paper.")
@choice("--granularity", values=["block", "channel"], text="Prune each stage as a whole, or each channel separately.")
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.05,
    show_default=True,
    help="Keep links whose normalized mean over a layer's heads is above this value.",
)
@common
def aal_links(
    *, run: Path, loss: str | None, out: Path | None, normalize: Any, granularity: Any, threshold: float, as_json: bool
) -> None:
    """Show the trained links of an aal run.

    Prints the mean |w| between each stage of the teacher and each layer of the student, and the links that the paper's
    Algorithm 1 keeps. If they form ranges of layers, also prints the ranges for a recipe. Writes only the picture.

    \b
    pipeline aal-links run
    pipeline aal-links run --out links.png --granularity channel --threshold 0.1
    """
    from student.losses.parts.aal_links import read
    from student.run_dir import is_smoke
    from student.settings import LinksConfig

    trained = read(run, loss)
    settings = LinksConfig(run=str(run), loss=loss, normalize=normalize, granularity=granularity, threshold=threshold)
    result, heat, shares = _selection(trained, settings)
    if out:
        draw(out, trained, heat, shares)
        result["picture"] = str(out)
    smoke = is_smoke(run)
    note = [f"{run}: a smoke run, whose links have learned nothing"] if smoke else []
    show({"run": str(run), "smoke": smoke, **result}, [*note, *_lines(settings, result)], as_json)


def _selection(trained: Trained, settings: LinksConfig) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Plain data; the heat map f64 `[stages, N]`; the share of each stage's channels that is kept, `[stages, N]`."""
    import torch

    from student.losses.parts.aal_links import extracted, ranges_of

    layout = trained.layout
    heat, choice = layout.heat(trained.weights), extracted(trained.weights, layout, settings)
    shares = torch.stack([part.double().mean(0) for part in torch.split(choice, list(layout.channels))])
    result = {
        "loss": trained.loss,
        "target": trained.target,
        "stages": [{"stage": n, "channels": c} for n, c in zip(layout.stages, layout.channels, strict=True)],
        "heads": list(layout.heads),
        "heat": heat.tolist(),
        "selection": {
            **settings.model_dump(exclude={"run"}),
            "kept": layout.count(choice),
            "of": trained.weights.numel(),
            "by_stage": shares.tolist(),
            "ranges": ranges_of(choice, layout),
        },
    }
    return result, heat, shares


def _lines(settings: LinksConfig, result: dict[str, Any]) -> list[str]:
    """The heat map as a table, the kept links, and the settings that select them."""
    heat, selection, stages = result["heat"], result["selection"], result["stages"]
    lines = [
        f"{settings.run}: loss {result['loss']}, target {result['target']}",
        "mean |w| of links, in 1/1000: stages of the teacher down, layers of the student across; * what is kept of all "
        "its channels, + of some",
        f"{'stage':>5} {'maps':>5}" + "".join(f"{n:>8}" for n in range(1, len(result["heads"]) + 1)),
    ]
    for stage, row, shares in zip(stages, heat, selection["by_stage"], strict=True):
        cells = (f"{1000 * w:7.2f}{'*' if s == 1 else '+' if s else ' '}" for w, s in zip(row, shares, strict=True))
        lines.append(f"{stage['stage']:>5} {stage['channels']:>5}" + "".join(cells))
    how = f"{settings.normalize}, by {settings.granularity}, above {settings.threshold:g}"
    share = 100 * selection["kept"] / selection["of"]
    lines.append(f"Algorithm 1 ({how}) keeps {selection['kept']:,} of {selection['of']:,} links, {share:.1f} %")
    if selection["kept"] == selection["of"]:
        lines.append(
            "  printed puts a weight of 0 near the middle of 0 to 1, far above the threshold: --normalize abs prunes"
            if settings.normalize == "printed"
            else "  all links are kept: a higher --threshold prunes"
        )
    elif not selection["kept"]:
        lines.append("  no link is kept, so no run can be trained with it: lower --threshold")
    else:
        where = f"losses.{result['loss']}.links"
        changed = settings.model_dump(exclude={"run"}, exclude_defaults=True).items()
        words = _words(f"{where}={settings.run}", *(f"{where}.{name}={value}" for name, value in changed))
        lines.append(f"  to train with them: {words}")
        if selection["ranges"]:
            text = str(selection["ranges"]).replace("None", "null")
            lines.append(f"  or, the same as ranges: {_words(f'{where}={text}')}")
    return lines


def _words(*settings: str) -> str:
    """Settings as command-line arguments."""
    return " ".join(f"--set {shlex.quote(setting)}" for setting in settings)


def draw(path: Path, trained: Trained, heat: Tensor, shares: Tensor) -> None:
    """Draw the paper's Figure 2: rows are stages, columns are layers, colors are the mean |w|, frames mark kept cells.

    Args:
        path: file of the picture.
        trained: the trained links.
        heat: `[stages, N]`.
        shares: the share of the stage's channels that is kept, `[stages, N]`.
    """
    from matplotlib.patches import Rectangle

    from pipeline import plotting

    rows, columns = heat.shape
    cell, left, top, bar = 0.42, 1.5, 0.75, 0.18
    width, height = max(columns * cell, 2.6), rows * cell
    figure = plotting.figure(left + width + 1.25, top + height + 0.55)
    axes = plotting.panel(figure, left, top, width, height)
    image = axes.imshow(heat.numpy(), cmap=plotting.MAP, aspect="auto", origin="lower", vmin=0)
    layout = trained.layout
    axes.set_xticks(range(columns), [str(n) for n in range(1, columns + 1)])
    axes.set_yticks(range(rows), [f"{n} ({c} maps)" for n, c in zip(layout.stages, layout.channels, strict=True)])
    axes.set_xlabel("layer of the student", fontsize=plotting.FONT - 1)
    axes.set_ylabel("stage of the teacher", fontsize=plotting.FONT - 1)
    for y, x in shares.nonzero().tolist():
        dash = "solid" if shares[y, x] == 1 else "dotted"
        frame = Rectangle((x - 0.42, y - 0.42), 0.84, 0.84, fill=False, linewidth=1.2, linestyle=dash)
        frame.set_edgecolor("white" if heat[y, x] < 0.7 * heat.max() else "black")
        axes.add_patch(frame)
    scale = plotting.panel(figure, left + width + 0.2, top, bar, height)
    figure.colorbar(image, cax=scale).set_label("mean |w| of links", fontsize=plotting.FONT - 1)
    plotting.write(figure, 0.1, 0.08, "Links between CNN and ViT", weight="bold")
    about = f"{plotting.shortened(trained.target, 60)}\nframed: kept for all channels; dotted: for some"
    plotting.write(figure, 0.1, 0.3, about, fontsize=plotting.FONT - 2.5, color=plotting.GRAY)
    plotting.save(figure, path)
