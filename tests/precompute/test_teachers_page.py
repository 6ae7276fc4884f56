"""`docs/teachers.md` says what `pipeline teachers` says; every network of it can be a teacher."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
import pytest

from pipeline.cli import main
from pipeline.inspection.teacher import table
from precompute.capabilities import bare, offers_of
from precompute.export import pytorch
from precompute.record_targets import usual_at
from precompute.taps import Tap
from precompute.teachers.teacher import Teacher, anatomy
from storage.errors import UserError
from tests.conftest import ROOT

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

ROWS = {
    match[1]: line
    for line in (ROOT / "docs" / "teachers.md").read_text().splitlines()
    if (match := re.match(r"\| `([\w.]+)` \|", line))
}
FEW = ["test_vit", "vit_small_patch16_dinov3", "swin_tiny_patch4_window7_224", "cait_xxs24_224", "densenet121"]
SIZES = (32, 64, 96, 112, 128, 160, 192, 224, 256)  # a small one that a network takes is looked for


def row(name: str) -> str:
    return table([offers_of(name)])[-1]


def test_the_page_has_a_row_for_every_family_that_was_tried() -> None:
    assert len(ROWS) >= 87
    assert not [name for name, line in ROWS.items() if line.split("|")[3].strip() == "–"], "all give maps"


def test_rows_of_the_page_are_what_the_command_says(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["teachers", *FEW])
    assert ended.value.code == 0
    assert capsys.readouterr().out.splitlines()[-len(FEW) :] == [ROWS[name] for name in FEW]


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in ROWS if name not in FEW])
def test_every_row_of_the_page_is_what_the_command_says(name: str) -> None:
    assert row(name) == ROWS[name]


def small(name: str) -> tuple[str, int, nn.Module]:
    """timm's name, size and network of a teacher, random, for small images."""
    import torch

    for size in SIZES:
        try:
            torch.manual_seed(0)
            model, _, network = bare(name, size, device="cpu")
            pytorch.require_size(network, size, name)
        except (UserError, RuntimeError):
            continue
        return model, size, network.requires_grad_(False)
    model, size, network = bare(name, device="cpu")
    return model, size, network.requires_grad_(False)


@pytest.mark.long
@pytest.mark.parametrize("name", ROWS)
def test_every_network_is_exported_with_its_maps_and_its_attention(name: str, tmp_path: Path) -> None:
    """Random weights, two images; parity is printed."""
    model, size, network = small(name)
    parts = anatomy(network, size)
    taps = [Tap("activations", grid=4, at=usual_at(parts))]
    offers = offers_of(name, size)
    taps += [Tap(tap) for tap in ("attention", "class_row", "v") if tap in offers.taps][:2]
    half = (0.5, 0.5, 0.5)
    teacher = Teacher(
        name="it", model=model, arguments={}, weights=None, digest="0", input_size=size, mean=half, std=half
    )
    images = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    file = tmp_path / "graph.onnx"
    exported = pytorch.export(teacher, taps, size, images, file=file, network=network)
    names = ", ".join(f"{tap.name} {parity:.1e}" for tap, parity in zip(taps, exported.parity, strict=True))
    error = "" if exported.attention_error is None else f"; rows and the network's own {exported.attention_error:.1e}"
    print(f"\n{name} at {size}: {names}{error}")
    assert max(exported.parity) <= 1e-4
    assert (exported.attention_error or 0) <= 1e-5
