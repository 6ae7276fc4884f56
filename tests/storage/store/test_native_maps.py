"""Native grids: maps on their own sides at rest, and what decoding makes of them, against PyTorch's interpolation."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from precompute.taps.activations import resize_matrix
from storage.store.codecs import Codec
from storage.store.manifests import TargetManifest
from storage.store.native_maps import NativeMaps

STAGE: dict[str, Any] = {"stage": 1, "tap": "x", "channels": 8, "side": 2}
GRID = 6
RUNS = ((3, 6), (2, 3), (4, 6), (1, 1), (5, 3))  # (channels, side): a side that comes again, and maps of one number


def native(antialias: bool = False) -> NativeMaps:
    sides = sorted({side for _, side in RUNS if side < GRID})
    matrices = tuple((side, tuple(map(tuple, resize_matrix(side, GRID, antialias).tolist()))) for side in sides)
    return NativeMaps(grid=GRID, stages=RUNS, matrices=matrices)


def codec(name: str, antialias: bool = False) -> Codec:
    return Codec(name, (15, GRID, GRID), 2, axes=("channel", "y", "x"), native=native(antialias))


def stages(seed: int = 0, count: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, channels, side, side, generator=generator) for channels, side in RUNS]


def flat(maps: list[torch.Tensor]) -> np.ndarray:
    """One side after another, in the order in which they first occur."""
    by_side = [[m.flatten(1) for m in maps if m.shape[-1] == side] for side in (6, 3, 1)]
    return torch.cat(list(itertools.chain(*by_side)), 1).numpy()


def resized(maps: list[torch.Tensor], antialias: bool = False) -> torch.Tensor:
    on_grid = [F.interpolate(m, (GRID, GRID), mode="bicubic", align_corners=False, antialias=antialias) for m in maps]
    return torch.cat([m if m.shape[-1] == GRID else r for m, r in zip(maps, on_grid, strict=True)], 1)


@pytest.mark.parametrize("antialias", [False, True])
def test_decoded_maps_are_pytorch_s_interpolation_of_those_at_rest(antialias: bool) -> None:
    maps = stages()
    arrays = codec("f32", antialias).encode(flat(maps))
    assert {name: array.shape[1:] for name, array in arrays.items()} == {
        "data_6": (7, 6, 6),
        "data_3": (7, 3, 3),
        "data_1": (1, 1, 1),
    }
    assert np.array_equal(arrays["data_3"], torch.cat([maps[1], maps[4]], 1).numpy())
    expected = resized(maps, antialias)
    np.testing.assert_allclose(codec("f32", antialias).decode(arrays), expected.numpy(), rtol=1e-5, atol=1e-5)
    on_torch = codec("f32", antialias).decode({name: torch.from_numpy(array) for name, array in arrays.items()})
    torch.testing.assert_close(on_torch, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "levels"), [("u8", 255), ("u4", 15)])
def test_codes_of_native_maps_cost_no_more_than_those_of_resized_ones(name: str, levels: int) -> None:
    maps = stages(1, 16)
    exact = resized(maps).numpy()
    found = codec(name).decode(codec(name).encode(flat(maps)))
    plain = Codec(name, (15, GRID, GRID), 2)
    before = plain.decode(plain.encode(exact))
    assert 0 < np.square(found - exact).sum() <= np.square(before - exact).sum()
    on_their_sides = codec(name).values_of(codec(name).encode(flat(maps)))
    for side, run in ((6, torch.cat([maps[0], maps[2]], 1)), (3, torch.cat([maps[1], maps[4]], 1)), (1, maps[3])):
        values = run.numpy()
        step = np.ptp(values, axis=(2, 3), keepdims=True) / levels + np.abs(values).max() * 2**-10
        assert (np.abs(on_their_sides[f"data_{side}"] - values) <= step / 2 + 1e-6).all()


def test_the_error_of_a_codec_is_told_of_what_a_student_gets() -> None:
    maps = stages(2, 12)
    error = codec("u4").error(flat(maps))
    exact, found = resized(maps).double().numpy(), codec("u4").decode(codec("u4").encode(flat(maps))).astype(np.float64)
    assert error.relative == pytest.approx(np.linalg.norm(exact - found) / np.linalg.norm(exact), rel=1e-5)
    student = torch.from_numpy(exact.mean(0)).expand(12, -1, -1, -1).clone().requires_grad_()
    losses = [F.mse_loss(student, torch.from_numpy(target), reduction="sum") for target in (exact, found)]
    first, second = (torch.autograd.grad(loss, student)[0].flatten() for loss in losses)
    assert error.loss_error == pytest.approx(float(losses[1] / losses[0] - 1), rel=1e-4)
    assert error.gradient_cosine == pytest.approx(float(F.cosine_similarity(first, second, dim=0)), abs=1e-6)
    assert codec("f32").error(flat(maps)).loss_error == 0


def test_a_view_of_efficientnet_b3_takes_half_the_bytes() -> None:
    """Seven stages of 24 to 384 maps, sides 14 and 7 at most: what ../README.md's table says."""
    runs = ((24, 14), (32, 14), (48, 14), (96, 14), (136, 14), (232, 7), (384, 7))
    maps = NativeMaps(grid=14, stages=runs, matrices=((7, tuple(map(tuple, resize_matrix(7, 14).tolist()))),))
    sizes = {name: Codec(name, (952, 14, 14), 2, native=maps).sample_bytes for name in ("u8", "u4")}
    assert sizes["u8"] == 96_040 + 4 * 952 <= 100_000
    assert sizes["u4"] == 96_040 // 2 + 4 * 952 <= 52_000


def test_maps_are_resized_exactly_inside_autocast() -> None:
    arrays = {name: torch.from_numpy(array) for name, array in codec("f32").encode(flat(stages())).items()}
    expected = codec("f32").decode(arrays)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codec("f32").decode(arrays), expected)


def test_images_that_are_all_alike_say_nothing_of_a_loss() -> None:
    error = codec("u4").error(flat(stages(0, 1)))
    assert error.relative > 0
    assert (error.loss_error, error.gradient_cosine) == (None, None)


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rows in logarithms": ({"codec": "log8"}, {}),
    "the largest values": ({"codec": "topk20"}, {}),
    "vectors": ({}, {"maps": 1}),
    "four axes": ({}, {"axes": ["layer", "channel", "y", "x"], "sample_shape": [1, 8, 4, 4]}),
    "no channels": ({}, {"axes": ["y", "x"], "sample_shape": [4, 4], "stages": [{**STAGE, "channels": 4}]}),
    "no square": ({"grid": None}, {"sample_shape": [8, 5, 4]}),
    "no stages": ({}, {"stages": []}),
    "a stage without a side": ({}, {"stages": [{"stage": 1, "tap": "x", "channels": 8}]}),
    "a side above the grid": ({}, {"stages": [{**STAGE, "side": 5}]}),
    "no matrix": ({}, {"resize": {}}),
    "a matrix of another side": ({}, {"resize": {"3": [[1 / 3] * 3] * 4}}),
    "a matrix of another grid": ({}, {"resize": {"2": [[0.5, 0.5]] * 3}}),
    "weights that add up to two": ({}, {"resize": {"2": [[1.0, 1.0]] * 4}}),
    "a weight of a million": ({}, {"resize": {"2": [[1e6, 1 - 1e6]] * 4}}),
    "a matrix without native maps": ({"native": False}, {}),
    "a scale a token of maps": ({"scale": "token"}, {}),
}


@pytest.mark.parametrize("what", [None, *WRONG])
def test_a_manifest_of_native_maps_that_cannot_be_decoded_is_refused(what: str | None) -> None:
    identity = {"teacher": "t", "bank": "b", "tap": "activations", "layers": [1], "grid": 4, "codec": "u8"}
    content: dict[str, Any] = {"format": 1, "kind": "target", "id": "t", "teacher": "t", "graph": 64 * "0", "output": 0}
    content |= {"sample_shape": [8, 4, 4], "maps": 2, "axes": ["channel", "y", "x"], "parity": 0.0}
    content |= {"attention_error": None, "stages": [STAGE], "resize": {"2": [[0.5, 0.5]] * 4}}
    nothing: dict[str, Any] = {}
    own, more = WRONG[what] if what else (nothing, nothing)
    content |= {"identity": {**identity, "native": True, **own}, **more}
    if what is None:
        assert TargetManifest.model_validate(content).codec.parts == {"data_2": (8, 2, 2)}
        return
    with pytest.raises(ValidationError):
        TargetManifest.model_validate(content)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["f32", "f16", "u8", "u4"])
def test_a_device_decodes_the_same_maps(name: str) -> None:
    arrays = codec(name).encode(flat(stages()))
    on_device = codec(name).decode({key: torch.from_numpy(array).cuda() for key, array in arrays.items()})
    assert on_device.is_cuda
    np.testing.assert_allclose(on_device.cpu().numpy(), codec(name).decode(arrays), rtol=1e-4, atol=1e-4)
