"""What a teacher offers, as lines for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from storage.progress import size_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from precompute.results import GraphOffers, TeacherOffers

SHOWN = 8  # tensors of a graph


def lines(offers: TeacherOffers) -> list[str]:
    """Sizes and a table of taps."""
    kinds = {"cnn": "CNN with {} stages", "vit": "ViT with {} attention layers"}
    kind = kinds.get(offers.network, f"network with {offers.stages} stages")
    text = [
        f"{offers.teacher}: {offers.model}, {kind.format(offers.layers)}, {offers.parameters:,} parameters, "
        f"input {offers.input_size}",
        f"{'tap':12} {'of one view image':22} {'codec':6} {'takes':>10} {'1.28 M images, 4 views':>24}",
    ]
    for tap, offer in offers.taps.items():
        shape = "x".join(map(str, offer.shape))
        imagenet = size_text(offer.bytes * 1_281_167 * 4)
        text.append(f"{tap:12} {shape:22} {offer.codec:6} {size_text(offer.bytes):>10} {imagenet:>24}")
    by_reason: dict[str, list[str]] = {}
    for tap, why in offers.refused.items():
        by_reason.setdefault(why, []).append(tap)
    text += [f"not {', '.join(taps)}: {why}" for why, taps in by_reason.items()]
    return text


def table(teachers: Sequence[TeacherOffers]) -> list[str]:
    """A table of several teachers in Markdown: a row each, with what it gives of one image."""
    columns = ["teacher", "input", "maps", "attention", *_OTHERS]
    rows = [[f"`{offers.teacher}`", str(offers.input_size), *_cells(offers)] for offers in teachers]
    lines = ["| " + " | ".join(row) + " |" for row in (columns, *rows)]
    return [lines[0], "|---|---|---|---|" + ":-:|" * len(_OTHERS), *lines[1:]]


_OTHERS = ("class_row", "q", "k", "v", "tokens", "class_token", "embedding", "logits")


def _cells(offers: TeacherOffers) -> list[str]:
    maps, rows = offers.taps.get("activations"), offers.taps.get("attention") or offers.taps.get("class_row")
    cells = [f"{maps.shape[0]} of {offers.stages} stages" if maps else "–"]
    if rows is None:
        cells.append("–")
    else:
        layers, heads, *queries, tokens = rows.shape
        cells.append(f"{layers} layers, {heads} heads, {tokens} tokens{'' if queries else ', class row alone'}")
    return [*cells, *("yes" if tap in offers.taps else "–" for tap in _OTHERS)]


def graph_lines(offers: GraphOffers) -> list[str]:
    """Input and outputs of a ready graph, and the last of the tensors that could give each tap."""
    image = f"{offers.input.name} {_shape(offers.input.shape)}"
    lines = [f"{offers.teacher}: {offers.parameters:,} parameters, input {image}"]
    lines += [f"output {name} {_shape(shape)}" for name, shape in offers.outputs.items()]
    lines.append("by their shapes, tensors that could give a tap (pipeline precompute … --tap-tensor TAP=TENSOR):")
    for tap, names in offers.tensors.items():
        more = f"{len(names) - SHOWN} more (--json has them), " if len(names) > SHOWN else ""
        lines.append(f"{tap:12} {more}{', '.join(names[-SHOWN:])}")
    return lines


def _shape(sizes: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, sizes))}]"
