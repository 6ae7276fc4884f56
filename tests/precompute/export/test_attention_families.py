"""Attention through ONNX: the graph's rows are those of the network's unfused layers, family by family."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from precompute.export import pytorch
from precompute.taps import Tap
from precompute.teachers.teacher import Teacher
from tests.precompute.networks import HALF, SMALL, make, seen_attention, sharpened
from tests.precompute.taps.test_attention import FAMILIES

if TYPE_CHECKING:
    from pathlib import Path

THROUGH_ONNX = ["DINOv3", "EVA-02", "PE-core", "BEiT", "BEiTv2", "relative positions, class token", "SAM", "CaiT"]


@pytest.mark.slow
@pytest.mark.parametrize("family", THROUGH_ONNX)
def test_rows_and_values_of_the_graph_are_those_that_the_network_uses(family: str, tmp_path: Path) -> None:
    name, arguments = FAMILIES[family]
    network: Any = sharpened(make(name, **{**SMALL, **arguments})).requires_grad_(False)
    rows = "class_row" if family == "CaiT" else "attention"
    teacher = Teacher(name="it", model=name, arguments={}, weights=None, digest="0", input_size=32, mean=HALF, std=HALF)
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    taps = [Tap(rows), Tap("v")]
    exported = pytorch.export(teacher, taps, 32, images, file=tmp_path / "g.onnx", network=copy.deepcopy(network))
    batch = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    seen = [part.reshape(5, -1, *part.shape[-2:]) for part in seen_attention(network, (batch - 0.5) / 0.5)]
    heads, *queries, tokens = exported.shapes[0][1:]
    shape = (heads, *(queries or [1]), tokens)
    expected = [part[:, :, 0] if rows == "class_row" else part for part in seen if part.shape[1:] == shape]
    found, values = exported.values
    assert found.shape[1] == len(expected) == values.shape[1]
    for n, theirs in enumerate(expected):
        assert np.abs(found[:, n] - theirs.numpy()).max() <= 1e-5 * float(theirs.max())
    assert (exported.attention_error or 0) <= 1e-5
