"""What a teacher offers, as lines for people."""

from __future__ import annotations

from typing import Any

from pipeline.inspection import size_text


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
    return text
