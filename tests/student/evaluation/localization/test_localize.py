"""Localization: contours against a border that is walked pixel by pixel, MaxBoxAcc's known answers, hostile boxes."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("cv2")
pytest.importorskip("scipy")

from typing import TYPE_CHECKING, Any

import timm

from pipeline.cli import main
from storage.errors import UserError
from storage.shards.index import cached_index
from storage.shards.shard import open_shards
from storage.shards.tar import Sample
from student.evaluation.localization.contours import contour_boxes, gray
from student.evaluation.localization.dataset import boxed_images, boxes_in
from student.evaluation.localization.localize import ClassAttention, localize
from student.evaluation.localization.max_box_acc import (
    best_overlaps,
    box_metrics,
    centered,
    found_boxes,
    max_box_acc,
    overlaps,
    resized_boxes,
)
from student.models.files import load_student
from tests.precompute.networks import attention_modules
from tests.student.runs import run

if TYPE_CHECKING:
    from pathlib import Path

AROUND = [(-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1)]  # clockwise from above


def walked(piece: np.ndarray) -> tuple[list[int], float]:
    """Box and polygon area of a piece's outer border, walked clockwise from its first pixel (Moore's neighbors)."""
    start = tuple(np.argwhere(piece)[0])

    def inside(y: int, x: int) -> bool:
        return 0 <= y < piece.shape[0] and 0 <= x < piece.shape[1] and bool(piece[y, x])

    border, at, back = [start], start, 6  # came from the left
    first: tuple[Any, int] | None = None
    while True:
        for turn in range(1, 9):
            way = (back + turn) % 8
            there = (at[0] + AROUND[way][0], at[1] + AROUND[way][1])
            if inside(*there):
                break
        else:
            break  # alone
        if (at, way) == first:
            break
        first = first or (at, way)
        back, at = (way + 4) % 8, there
        border.append(at)
    y, x = np.array(border[:-1] if len(border) > 1 else border, np.float64).T
    area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    return [int(x.min()), int(y.min()), int(x.max()), int(y.max())], area


def all_walked(mask: np.ndarray) -> tuple[list[list[int]], list[int], list[list[int]]]:
    """Boxes of outer contours, indices of the largest of them, and boxes of holes."""
    from scipy import ndimage

    pieces, count = ndimage.label(mask, np.ones((3, 3)))
    found = [walked(pieces == n) for n in range(1, count + 1)]
    largest = max(area for _, area in found)
    ground, grounds = ndimage.label(np.pad(~mask, 1, constant_values=True))
    holes = []
    for n in range(1, grounds + 1):
        hole = (ground == n)[1:-1, 1:-1]
        if n != ground[0, 0]:
            y, x = np.nonzero(ndimage.binary_dilation(hole) & mask)  # pixels beside the hole
            holes.append([int(x.min()), int(y.min()), int(x.max()), int(y.max())])
    return [box for box, _ in found], [n for n, (_, area) in enumerate(found) if area == largest], holes


def square(left: int, top: int, side: int) -> np.ndarray:
    mask = np.zeros((224, 224), np.uint8)
    mask[top : top + side, left : left + side] = 255
    return mask


@pytest.mark.parametrize("seed", range(60))
def test_contours_are_those_that_are_walked(seed) -> None:
    chance = np.random.default_rng(seed)
    mask = chance.random((12, 15)) < chance.choice([0.1, 0.3, 0.5, 0.7, 0.9])
    if seed % 3 == 0:  # smooth ones with rings and islands
        noise = F.interpolate(torch.tensor(chance.random((1, 1, 5, 5))), (40, 30), mode="bicubic")[0, 0].numpy()
        mask = np.abs(noise - 0.5) < 0.2
    if not mask.any():
        mask[3, 4] = True
    outer, largest, holes = all_walked(mask)
    boxes = contour_boxes(mask).tolist()
    assert sorted(boxes) == sorted([*outer, *holes])
    assert boxes[0] in [outer[n] for n in largest]


def test_a_larger_area_wins_over_more_pixels() -> None:
    """A line has none, a ring all that is in it."""
    mask = np.zeros((20, 40), bool)
    mask[1, :] = True
    mask[5:8, 5:8] = True
    assert contour_boxes(mask)[0].tolist() == [5, 5, 7, 7]
    mask[10:16, 20:26] = True
    mask[11:15, 21:25] = False
    assert contour_boxes(mask)[0].tolist() == [20, 10, 25, 15]
    assert sorted(contour_boxes(mask).tolist()) == [[0, 1, 39, 1], [5, 5, 7, 7], [20, 10, 25, 15], [20, 10, 25, 15]]
    assert len(contour_boxes(np.zeros((5, 5), bool))) == 0
    corner = np.zeros((40, 40), bool)
    corner[0:20, 0:3] = corner[17:20, 0:20] = True  # in a larger box, but with less in it
    corner[25:35, 25:35] = True
    assert contour_boxes(corner)[0].tolist() == [25, 25, 34, 34]


def test_overlaps_count_both_ends() -> None:
    one = np.array([[0, 0, 9, 9], [5, 5, 14, 14], [10, 0, 19, 9], [9, 9, 9, 9]])
    assert overlaps(one, one[:1])[:, 0].tolist() == [1.0, 25 / 175, 0.0, 0.01]


def test_a_perfect_mask_scores_less_by_the_official_convention() -> None:
    truth = np.array([[60, 80, 109, 129]])
    image = square(60, 80, 50)
    assert best_overlaps(image, truth, "official").max() == pytest.approx(2500 / 2601)
    assert round(2500 / 2601, 3) == 0.961
    assert best_overlaps(image, truth, "exact").min() == 1.0
    assert found_boxes(square(200, 0, 24), 0, "official").tolist() == [[200, 0, 223, 24]]
    assert found_boxes(np.zeros((224, 224), np.uint8), 0, "official").tolist() == [[0, 0, 0, 0]]


def test_all_contours_find_what_the_largest_hides() -> None:
    image = square(0, 0, 100) | square(150, 150, 40)
    best = best_overlaps(image, np.array([[150, 150, 189, 189]]), "exact")
    assert best.max(1).tolist() == [0.0, 1.0]
    ring = square(20, 20, 60)
    ring[30:70, 30:70] = 0  # the hole's contour runs on the ring
    best = best_overlaps(ring, np.array([[29, 29, 70, 70]]), "exact")
    assert best[0].max() == pytest.approx(42**2 / 60**2)
    assert best[1].max() == 1.0
    two = np.array([[0, 0, 99, 99], [150, 150, 189, 189]])
    assert best_overlaps(image, two, "exact").max(1).tolist() == [1.0, 1.0]


def test_each_threshold_is_the_one_of_a_thousand_and_each_overlap_has_its_own_best() -> None:
    """Equal to cutting the map at 0, 0.001, … 0.999 of its maximum, one after another."""
    ramp = np.abs(np.arange(224)[None] - 111.5) + np.abs(np.arange(224)[:, None] - 90)
    image = gray((300 - ramp).astype(np.float32))
    truth = np.array([[80, 60, 140, 120]])
    best = best_overlaps(image, truth, "official")
    printed = [
        float(overlaps(found_boxes(image, int(t * image.max()), "official")[:1], truth)[0, 0])
        for t in np.arange(0, 1, 0.001)[::37]
    ]
    assert printed == [best[0, int(t * 255)] for t in np.arange(0, 1, 0.001)[::37]]
    assert set((np.arange(0, 1, 0.001) * 255).astype(int)) == set(range(255))
    several = np.stack([best[0], np.roll(best[0], 40)])
    found = max_box_acc(several)
    assert found[0.3].accuracy >= found[0.5].accuracy >= found[0.7].accuracy
    for overlap, one in found.items():
        assert one.accuracy == 100 * (several >= overlap).mean(0).max()


def test_maps_without_values_find_nothing() -> None:
    assert not gray(np.full((4, 4), 3.0, np.float32)).any()
    assert not gray(np.full((4, 4), np.nan, np.float32)).any()
    assert sorted(set(gray(np.array([[-1.0, 0], [1, 3]], np.float32)).ravel())) == [0, 63, 127, 255]


@pytest.mark.parametrize(
    ("name", "flat"),
    [("deit_tiny_patch16_224", "queries"), ("deit_tiny_patch16_224", "tokens"), ("pit_ti_224", "queries")],
)
def test_a_student_that_looks_everywhere_alike_finds_the_first_pixel(name, flat) -> None:
    """As in the authors' code, where a constant map is zeros: its box is (0, 0, 0, 0) at each threshold."""
    model = timm.create_model(name, num_classes=3).eval()
    if flat == "queries":  # all scores are zero
        for layer in attention_modules(model):
            layer.qkv.weight.data[: layer.qkv.weight.shape[1]] = 0
            layer.qkv.bias.data[: layer.qkv.weight.shape[1]] = 0
    else:  # all patches are the same
        model.pos_embed.data.zero_()
    pixels = torch.full((2, 3, 224, 224), 0.3)
    for values in ClassAttention(model, "x").maps(pixels):
        level = gray(values)
        assert not level.any()
        truth = np.array([[0, 0, 9, 9]])
        assert (best_overlaps(level, truth, "official") == 0.01).all()
        assert found_boxes(level, 100, "official").tolist() == [[0, 0, 0, 0]]


def test_rounding_is_not_blown_up_and_what_is_more_is() -> None:
    noise = np.random.default_rng(0).random((8, 8), np.float32)
    assert not gray(np.float32(0.3) + 1e-7 * noise).any()
    assert gray(np.float32(0.3) + 1e-5 * noise).max() == 255
    assert gray(1e-20 * noise).max() == 255, "small is not constant"


def test_the_centered_box_is_as_large_as_is_best() -> None:
    truth = [np.array([[62, 62, 161, 161]]), np.array([[62, 62, 161, 161]]), np.array([[0, 0, 20, 20]])]
    found = centered(truth)
    assert found[0.7].accuracy == pytest.approx(200 / 3)
    assert found[0.7].side == 84  # the smallest of those that are as good
    whole = centered([np.array([[0, 0, 223, 223]])])
    assert whole[0.5].accuracy == 100.0


def test_means_are_rounded_once() -> None:
    """Of six images four are right at 0.3 and three at 0.5: 58.333, where the mean of 66.667 and 50 is 58.334."""
    best = np.repeat(np.array([0.8, 0.6, 0.6, 0.4, 0.1, 0.1])[:, None, None], 2, 1).repeat(255, 2)
    told = box_metrics(best, [np.array([[0, 0, 9, 9]])] * 6).to_json()
    for kind in ("v1", "v2"):
        assert told[kind]["0.3"]["accuracy"] == 66.667
        assert told[kind]["means"] == {"0.3,0.5": 58.333, "0.3,0.5,0.7": 44.444}
    assert (told["max_box_acc"], told["max_box_acc_v2"]) == (50.0, 44.444)


def test_boxes_are_resized_as_the_images_are() -> None:
    assert resized_boxes([[1, 26, 38, 63]], (64, 64)).tolist() == [[3, 91, 133, 220]]
    assert resized_boxes([[0, 0, 100, 50], [10, 10, 20, 20]], (100, 50)).tolist() == [
        [0, 0, 224, 224],
        [22, 44, 44, 89],
    ]
    assert resized_boxes([[180, 0, 320, 10]], (320, 224)).tolist() == [[126, 0, 224, 10]]
    for width in range(64, 1001):  # exactly, in integers
        boxes = [[x, 0, x, 0] for x in range(width + 1)]
        assert resized_boxes(boxes, (width, 50))[:, 0].tolist() == [x * 224 // width for x in range(width + 1)]
    assert resized_boxes([], (64, 64)).shape == (0, 4)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[" * 100_000,
        '{"bbox": 3}',
        '{"bbox": [1, 2, 3]}',
        '{"bbox": [1, 2, 3, 99]}',
        '{"bbox": [5, 2, 3, 9]}',
        '{"bbox": ["1", 2, 3, 4]}',
        '{"bbox": [NaN, 2, 3, 4]}',
        '{"bbox": [-1, 2, 3, 4]}',
        '{"bbox": {"x": 1}}',
        '{"bbox": [true, 2, 3, 4]}',
        '{"bbox": [[1, 2, 3, 4], [1]]}',
        '{"bbox": [0, 0, 1e400, 1]}',
        '{"bbox": [0, 0, 1' + "0" * 400 + ", 1]}",
        '{"bbox": [[[1, 2, 3, 4]]]}',
    ],
)
def test_boxes_that_are_none_are_named(text) -> None:
    sample = Sample(key="k", kind="png", image=b"", label=0, json=text.encode())
    with pytest.raises(UserError, match=r"x\.tar: key 'k': (its json|bbox).*pack again"):
        boxes_in(sample, (40, 32), "x.tar: key 'k'")


@pytest.mark.parametrize("text", [None, "{}", "[]", '{"bbox": null}', '{"bbox": []}'])
def test_samples_may_have_none(text) -> None:
    sample = Sample(key="k", kind="png", image=b"", label=0, json=text and text.encode())
    assert boxes_in(sample, (40, 32), "x") == []
    two = replace(sample, json=b'{"bbox": [[1, 2, 3, 4], [0, 0, 40, 32]]}')
    assert boxes_in(two, (40, 32), "x") == [[1, 2, 3, 4], [0, 0, 40, 32]]


# ---------------------------------------------------------------------------------------------- students


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("boxes") / "run"
    run(world, out, "scratch", store=None)
    return out


@pytest.fixture
def boxed(tmp_path: Path) -> str:
    """A shard of 30 images, of which 20 have boxes."""
    import io

    import webdataset
    from PIL import Image

    url = str(tmp_path / "boxed-000000.tar")
    with webdataset.TarWriter(url, mtime=0) as writer:
        for i in range(30):
            picture = io.BytesIO()
            pixels = np.full((32, 64, 3), 30 + i, np.uint8)
            pixels[8:24, 16:48] = 200
            Image.fromarray(pixels).save(picture, "PNG")
            sample = {"__key__": f"image_{i:03d}", "png": picture.getvalue(), "cls": b"0"}
            if i % 3:
                sample["json"] = json.dumps({"bbox": [16, 8, 47, 23]}).encode()
            writer.write(sample)
    return url


def test_a_map_is_the_mean_of_what_the_class_token_attends_to(trained) -> None:
    model, about = load_student(trained / "last.safetensors")
    looker = ClassAttention(model, "x")
    pixels = torch.randn(3, 3, about.img_size, about.img_size)
    rows = []
    for layer in attention_modules(model):
        layer.fused_attn = False
        layer.attn_drop.register_forward_hook(lambda _, __, out: rows.append(out[:, :, 0, 1:]))
    found = looker.maps(pixels)
    mean = torch.stack([row / row.sum(-1, keepdim=True) for row in rows]).mean((0, 2)).view(3, 1, 8, 8)
    expected = F.interpolate(mean, (224, 224), mode="bicubic")[:, 0]
    assert np.allclose(found, expected.detach(), atol=1e-6)
    assert looker.text == "mean of 6 class-row maps of 8x8"


def test_a_student_that_pools_its_patches_is_read_on_each_grid() -> None:
    looker = ClassAttention(timm.create_model("pit_ti_224", num_classes=3).eval(), "x")
    assert looker.text == "mean of 60 class-row maps of 27x27 and 14x14 and 7x7"
    found = looker.maps(torch.rand(1, 3, 224, 224))
    assert found.shape == (1, 224, 224)
    share = sum(looker.grids.count(g) * heads / g**2 for g, heads in ((27, 2), (14, 4), (7, 8))) / 60
    assert found.mean() == pytest.approx(share, rel=0.02)  # each map sums to one over its own patches


class Pointer:
    """Looks at what is bright."""

    def maps(self, pixels: torch.Tensor) -> np.ndarray:
        return F.interpolate(pixels.mean(1, keepdim=True), (224, 224), mode="nearest")[:, 0].numpy()


def test_who_looks_at_the_object_finds_it(trained, boxed) -> None:
    _, about = load_student(trained / "last.safetensors")
    found = localize(Pointer(), about, open_shards(boxed), "exact", keep_images=True)  # type: ignore[arg-type]
    told = found.metrics.to_json()
    assert (found.samples, found.without_box) == (20, 10)
    assert told["max_box_acc"] == told["max_box_acc_v2"] == 100.0
    assert told["v2"]["means"] == {"0.3,0.5": 100.0, "0.3,0.5,0.7": 100.0}
    assert told["center"]["0.7"]["accuracy"] == 100.0  # the object is in the middle
    assert all(one.overlap >= 0.5 for one in found.images)
    assert 4 <= len(found.images) <= 8


def test_the_command_and_its_picture(trained, boxed, tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "seen.png"
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "localize", str(trained), "--shards", boxed, "--out", str(out), "--json"])
    said = capsys.readouterr()
    assert ended.value.code == 0, said.err
    result = json.loads(said.out)
    assert result["max_box_acc"] == result["v1"]["0.5"]["accuracy"]
    assert result["v2"]["0.5"]["accuracy"] >= result["max_box_acc"]
    assert result["files"] == [str(out)]
    assert out.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        main(["evaluate", "localize", str(trained), "--shards", boxed, "--box", "exact"])
    assert "centered box" in capsys.readouterr().out


def test_mistakes_are_told(world, trained, boxed, tmp_path, capsys) -> None:
    for words, status, message in (
        (["localize", "--shards", world.shards[0]], 1, "no sample has a bbox in its json"),
        (["localize", "--shards", f"x={boxed}"], 1, "give the shards alone"),
        (["localize", "--shards", boxed, "--out", "x.txt"], 1, "a picture's name ends in"),
        (["accuracy", "--shards", boxed, "--out", "x.png"], 2, "No such option '--out'"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["evaluate", words[0], str(trained), *words[1:]])
        assert ended.value.code == status
        assert message in capsys.readouterr().err


def test_a_student_without_a_class_token_is_told() -> None:
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    bare = timm.create_model("vit_tiny_patch16_224", global_pool="avg", class_token=False, **small).eval()
    with pytest.raises(UserError, match="x: the student has no class token"):
        ClassAttention(bare, "x")
    with pytest.raises(UserError, match="no attention over all tokens"):
        ClassAttention(timm.create_model("resnet10t").eval(), "x")


def test_real_boxes_are_those_of_the_source(shared) -> None:
    url = str(shared / "data" / "tinyimagenet-val-000000.tar")
    images = list(boxed_images(open_shards(url), 64))
    assert len(images) == len(cached_index(url)) == 500
    assert all(len(image.boxes) == 1 for image in images)
    areas = [float((box[2] - box[0] + 1) * (box[3] - box[1] + 1)) / 224**2 for image in images for box in image.boxes]
    assert np.median(areas) == pytest.approx(0.55, abs=0.02)  # the README beside the data
