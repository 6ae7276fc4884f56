"""What a teacher offers, as lines for people."""

from __future__ import annotations

from typing import Any

from precompute.taps.registry import VIT
from storage.progress import size_text

SHOWN = 8  # tensors of a graph


def lines(found: dict[str, Any]) -> list[str]:
    """Sizes and a table of taps."""
    kind = {"cnn": "CNN with {} stages", "vit": "ViT with {} layers"}.get(found["network"], "network")
    text = [
        f"{found['teacher']}: {found['model']}, {kind.format(found['layers'])}, {found['parameters']:,} parameters, "
        f"input {found['input_size']}",
        f"{'tap':12} {'of one view image':22} {'codec':6} {'takes':>10} {'1.28 M images, 4 views':>24}",
    ]
    for tap, about in found["taps"].items():
        shape = "x".join(map(str, about["shape"]))
        whole = size_text(about["bytes"] * 1_281_167 * 4)
        text.append(f"{tap:12} {shape:22} {about['codec']:6} {size_text(about['bytes']):>10} {whole:>24}")
    others = {"cnn": VIT, "vit": ("activations",), "other": ("activations", *VIT)}[
        found["network"]
    ]  # of other networks
    by_reason: dict[str, list[str]] = {}
    for tap, why in found["refused"].items():
        if tap not in others:
            by_reason.setdefault(why, []).append(tap)
    text += [f"not {', '.join(taps)}: {why}" for why, taps in by_reason.items()]
    if found["network"] == "other":
        text.append(
            "neither a CNN with stages nor a plain ViT, so it gives neither activations nor tokens nor attention"
        )
    return text


def graph_lines(found: dict[str, Any]) -> list[str]:
    """Input and outputs of a ready graph, and the last of the tensors that could give each tap."""
    taken = found["input"]
    lines = [f"{found['teacher']}: {found['parameters']:,} parameters, input {taken['name']} {_shape(taken['shape'])}"]
    lines += [f"output {name} {_shape(shape)}" for name, shape in found["outputs"].items()]
    lines.append("by their shapes, tensors that could give a tap (pipeline precompute … --tap-tensor TAP=TENSOR):")
    for tap, names in found["tensors"].items():
        more = f"{len(names) - SHOWN} more (--json has them), " if len(names) > SHOWN else ""
        lines.append(f"{tap:12} {more}{', '.join(names[-SHOWN:])}")
    return lines


def _shape(sizes: list[Any]) -> str:
    return f"[{', '.join(map(str, sizes))}]"
