"""The operations of `deit`: the same bytes and the same draws in every process, and what the papers and timm say."""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from storage.operations import FILL, LEVELS, OPERATIONS, _argument, draw_operations
from storage.policies import policy
from storage.testing import synthetic_image
from storage.views import (
    COLUMNS,
    CUTMIX,
    INVALID,
    MIXUP,
    TRIES,
    Mix,
    View,
    decode,
    draw,
    generator,
    mixed,
    render,
    settle,
)
from tests.storage.helpers import encoded, noise, optional_features, with_orientation

DEIT = policy("deit", 48, 3)
NUMBERS = {name: number for number, (name, _) in OPERATIONS.items()}

# Small and large arguments of each operation.
ARGUMENTS: dict[str, tuple[float, ...]] = {
    "auto_contrast": (0,), "equalize": (0,), "invert": (0,),
    "rotate": (-30, -0.37, 0.001, 17.3, 30),
    "posterize": (1, 2, 4, 8),
    "solarize": (0, 26, 128, 256),
    "solarize_add": (0, 1, 60, 110, 128),
    **dict.fromkeys(["color", "contrast", "brightness", "sharpness"], (0.1, 0.73, 1.0, 1.0001, 1.37, 1.9)),
    **dict.fromkeys(["shear_x", "shear_y"], (-0.3, -0.013, 0.0007, 0.3)),
    **dict.fromkeys(["translate_x", "translate_y"], (-0.45, -0.003, 0.1234567, 0.45)),
}  # fmt: skip


def pictures() -> dict[str, bytes]:
    """Images of every format and of shapes that are awkward."""
    photo = synthetic_image(2, np.random.default_rng(2), (233, 151))
    sizes = {"odd": (61, 47), "one pixel": (1, 1), "a column": (1, 50), "very wide": (700, 5), "tall": (33, 190)}
    images = {
        f"{name} {kind}": encoded(noise(*size), kind)
        for name, size in sizes.items()
        for kind in ("PNG", "JPEG", "WEBP")
    }
    return {
        **images,
        "photo PNG": encoded(photo, "PNG"),
        "photo JPEG": encoded(photo, "JPEG", quality=75),
        "photo JPEG, progressive": encoded(photo, "JPEG", quality=60, progressive=True, subsampling=1),
        "photo JPEG, full colour": encoded(photo, "JPEG", quality=95, subsampling=0),
        "photo WEBP": encoded(photo, "WEBP", quality=70),
        "photo WEBP, lossless": encoded(photo, "WEBP", lossless=True),
        "photo turned": with_orientation(photo, 6, "JPEG"),
        "grey JPEG": encoded(photo.convert("L"), "JPEG"),
        "CMYK JPEG": encoded(noise(40, 31, "CMYK"), "JPEG"),
        "palette": encoded(photo.convert("P"), "PNG"),
        "alpha": encoded(noise(23, 40, "RGBA"), "WEBP", lossless=True),
    }


def framings(width: int, height: int) -> dict[str, View]:
    """Views of every operation but those of RandAugment."""
    whole = (0.0, 0.0, float(width), float(height))
    middle = (width * 0.3, height * 0.21, width * 0.3 + max(width * 0.4, 0.7), height * 0.21 + max(height * 0.61, 0.6))
    corner = (float(width // 2), float(height // 3), float(width), float(height))
    return {
        "whole": View(whole),
        "middle": View(middle),
        "corner, flipped": View(corner, flip=True),
        "moved": View(whole, shift=(5, -3), flip=True),
        "erased": View(middle, erased=(3, 5, 30, 33), erase_seed=2**32 - 1),
        "all of it": View(
            corner, flip=True, operations=((NUMBERS["rotate"], 13.7), (NUMBERS["color"], 1.81)),
            erased=(0, 0, 20, 36), erase_seed=1,
        ),
    }  # fmt: skip


def jobs(images: dict[str, bytes]) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Everything that is rendered: its name, and what gives its bytes."""
    for name, data in images.items():
        yield f"decode {name}", lambda data=data: decode(data).tobytes()
        for what, view in framings(*decode(data).size).items():
            yield f"{what}: {name}", lambda data=data, view=view: render(data, view, 37).tobytes()
    for name in ("photo JPEG", "odd PNG", "very wide WEBP"):
        image = decode(images[name])
        for operation, arguments in ARGUMENTS.items():
            for argument in arguments:
                view = View((0, 0, image.width, image.height), operations=((NUMBERS[operation], argument),))
                yield (
                    f"{operation} {argument}: {name}",
                    lambda image=image, view=view: render(image, view, 37).tobytes(),
                )
    for i in range(200):
        yield f"deit {i}", functools.partial(drawn_pixels, images, i)


def drawn_view(images: dict[str, bytes], i: int) -> tuple[bytes, View]:
    """One of 200 drawn views, mixed within blocks of eight."""
    data = images[sorted(images)[i % len(images)]]
    block = range(i // 8 * 8, i // 8 * 8 + 8)
    return data, draw(DEIT, f"key {i}", i % 4, decode(data).size, i, block)


def drawn_pixels(images: dict[str, bytes], i: int) -> bytes:
    data, view = drawn_view(images, i)
    own = render(data, view, DEIT.size)
    if view.mix is None:
        return own.tobytes()
    other = render(*drawn_view(images, view.mix.partner), DEIT.size)
    return mixed(own, other, view.mix).tobytes()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def pixel_digests(images: dict[str, bytes]) -> dict[str, str]:
    """Name -> digest of the bytes of everything that is rendered."""
    return {name: digest(work()) for name, work in jobs(images)}


LINES = ["deit", "rrc(0.3,0.9)|erase(1)|mix(0.2,0)", "resize|randaug(5,3)|mix(0,3.5)", "crop(0.2)|mix(7,0.4)"]


def draw_digests() -> dict[str, str]:
    """Name -> digest of the rows of drawn views: every bit of every parameter."""
    sizes = [(500, 375), (32, 32), (1, 1), (3, 900), (61, 47)]
    return {
        f"{line}, seed {seed}, {width}x{height}": digest(b"".join(
            draw(policy(line, 224, seed), f"key {i}", i % 5, (width, height), i % 64, range(64)).row().tobytes()
            for i in range(60)
        ))
        for line in LINES for seed in (0, 2**63 - 1) for width, height in sizes
    }  # fmt: skip


def answer() -> None:
    """What a child process prints: images come as hexadecimal JSON on standard input."""
    images = {name: bytes.fromhex(text) for name, text in json.load(sys.stdin).items()}
    print(json.dumps([pixel_digests(images), draw_digests()]))


@pytest.fixture(scope="module")
def images() -> dict[str, bytes]:
    return pictures()


@pytest.fixture(scope="module")
def here(images) -> list[dict[str, str]]:
    return [pixel_digests(images), draw_digests()]


# ---------------------------------------------------------------------------------------------- contract 2

NO_AVX = "glibc.cpu.hwcaps=-AVX,-AVX2,-AVX512F,-AVX512VL,-AVX512BW,-FMA,-FMA4,-BMI2,-ERMS,-SSE4_1,-SSE4_2"
SETTINGS: dict[str, dict[str, str]] = {
    "one thread": dict.fromkeys(["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"], "1"),
    "seven threads": dict.fromkeys(["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"], "7"),
    "NumPy's baseline": {"NPY_DISABLE_CPU_FEATURES": optional_features()},
    "torch's baseline": {"ATEN_CPU_CAPABILITY": "default"},
    "libjpeg without SIMD": {"JSIMD_FORCENONE": "1"},
    "libjpeg with SSE2": {"JSIMD_FORCESSE2": "1"},
    "a math library without FMA": {"GLIBC_TUNABLES": "glibc.cpu.hwcaps=-FMA,-FMA4"},
    "a math library for old processors": {"GLIBC_TUNABLES": NO_AVX},
}
SETTINGS["all of them, and memory that is never zero"] = {
    "MALLOC_PERTURB_": "165", "PYTHONHASHSEED": "1",
    **{name: value for setting in SETTINGS.values() for name, value in setting.items()},
}  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS)
def test_contract_2_every_operation_of_deit_gives_the_same_bytes_in_another_process(images, here, setting):
    program = "from tests.storage.test_operations import answer; answer()"
    if "ATEN_CPU_CAPABILITY" in SETTINGS[setting]:  # it counts, if at all, where torch is there
        program = "import torch; torch.set_flush_denormal(True); torch.ones(9).exp().sum(); " + program
    child = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], env={**os.environ, **SETTINGS[setting]},
        input=json.dumps({name: data.hex() for name, data in images.items()}), capture_output=True, text=True,
    )  # fmt: skip
    assert not child.returncode, child.stderr
    pixels, draws = json.loads(child.stdout)
    assert {name for name in here[0] if pixels.get(name) != here[0][name]} == set(), "pixels differ"
    assert {name for name in here[1] if draws.get(name) != here[1][name]} == set(), "draws differ"
    assert len(pixels) > 500


def test_contract_2_several_threads_at_once_give_the_same_bytes(images, here):
    work = list(jobs(images))
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda job: digest(job[1]()), [*work, *work[::-1]]))
    expected = [here[0][name] for name, _ in work]
    assert found == expected + expected[::-1]


def test_contract_2_what_is_rendered_covers_every_operation(images):
    views = [drawn_view(images, i)[1] for i in range(200)]
    assert {number for view in views for number, _ in view.operations} == set(OPERATIONS)
    assert {view.mix.kind for view in views if view.mix} == {MIXUP, CUTMIX}
    assert {view.flip for view in views} == {False, True}
    assert sum(view.erased != (0, 0, 0, 0) for view in views) > 20
    assert set(ARGUMENTS) == set(NUMBERS)


# ---------------------------------------------------------------------------------------------- rows


def test_a_drawn_view_is_the_row_that_it_makes():
    for i, line in enumerate(LINES * 150):
        view = draw(policy(line, 64, i), f"{i}", i % 9, (1 + i * 7 % 400, 1 + i * 13 % 300), i % 22, range(22))
        row = view.row()
        assert View.of(row) == view
        assert View.of(np.frombuffer(row.tobytes(), "<f8")) == view
        assert View.of(row).row().tobytes() == row.tobytes()
        told = dict(zip(COLUMNS, row, strict=True))
        assert told["partner"] == (view.mix.partner if view.mix else -1)
        assert (told["op1"], told["op2"]) == tuple([n for n, _ in view.operations] + [0, 0])[:2]


def test_all_that_is_drawn_for_mixing_and_erasing_is_whole_numbers():
    """The C library's last bits, which differ between processors, must have nothing to decide."""
    whole = [COLUMNS.index(name) for name in COLUMNS if not name.startswith("magnitude")]
    for view in views_of("deit", 300):
        assert np.array_equal(view.row()[whole], np.rint(view.row()[whole]))
    assert 0 <= max(view.erase_seed for view in views_of("deit", 300)) < 2**32


# ---------------------------------------------------------------------------------------------- what is drawn


def views_of(line: str, count: int, side: int = 224, size: tuple[int, int] = (500, 375), n: int = 64) -> list[View]:
    drawn_from = policy(line, side, 11)
    return [draw(drawn_from, f"{i}", 0, size, i % n, range(n)) for i in range(count)]


@pytest.mark.parametrize("size", [(500, 375), (32, 32), (64, 90)])
@pytest.mark.parametrize("scale", [(0.08, 1), (0.5, 0.6)])
def test_a_crop_lies_in_the_image_with_its_area_and_aspect_ratio_in_range(size, scale):
    areas, ratios = [], []
    for view in views_of(f"rrc({scale[0]},{scale[1]})", 400, size=size):
        left, top, right, bottom = view.box
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]
        assert view.box == tuple(map(round, view.box))
        areas.append((right - left) * (bottom - top) / (size[0] * size[1]))
        ratios.append((right - left) / (bottom - top))
    slack = 1 + 1.5 / (min(size) * math.sqrt(scale[0]))  # sides are rounded to whole pixels
    assert scale[0] / slack <= min(areas)
    assert max(areas) <= scale[1] * slack
    assert 3 / 4 / slack <= min(ratios)
    assert max(ratios) <= 4 / 3 * slack
    if scale == (0.08, 1):
        assert min(areas) < 0.12
        assert max(areas) > 0.7  # large boxes of an extreme ratio do not fit
        assert np.median(ratios) == pytest.approx(1, abs=0.05), "log-uniform: as often wide as tall"


@pytest.mark.parametrize(
    ("size", "box"),
    [((1000, 10), (493, 0, 506, 10)), ((10, 1000), (0, 493, 10, 506)), ((30, 1), (14, 0, 15, 1)), ((1, 1), None)],
)
def test_where_no_crop_fits_the_largest_allowed_one_in_the_middle_is_taken(size, box):
    found = {view.box for view in views_of("rrc(0.9,1)", 50, size=size)}
    assert found == {box or (0, 0, 1, 1)}
    assert TRIES == 10


def test_erased_boxes_lie_in_the_view_as_often_and_as_large_as_they_should():
    for side, p in ((224, 0.25), (32, 0.25), (32, 1.0)):
        views = views_of(f"resize|erase({p})", 1500, side=side)
        boxes = [view.erased for view in views if view.erased != (0, 0, 0, 0)]
        assert abs(len(boxes) / 1500 - p) <= 4 * math.sqrt(p * (1 - p) / 1500) + 0.001
        slack = 1 + 1.5 / (side * math.sqrt(0.02 * 0.3))
        for left, top, right, bottom in boxes:
            assert 0 <= left < right <= side
            assert 0 <= top < bottom <= side
            assert 0.02 / slack <= (right - left) * (bottom - top) / side**2 <= slack / 3
            assert 0.3 / slack <= (right - left) / (bottom - top) <= slack / 0.3
        ratios = sorted((right - left) / (bottom - top) for left, top, right, bottom in boxes)
        assert ratios[0] < 0.45
        assert ratios[-1] > 1 / 0.45
        assert 0.75 < ratios[len(ratios) // 2] < 1 / 0.75
        assert all(view.erase_seed == 0 for view in views if view.erased == (0, 0, 0, 0))
        assert len({view.erase_seed for view in views}) >= len(boxes)


def test_a_side_too_small_to_erase_a_part_of_is_left_alone():
    assert {view.erased for view in views_of("resize|erase(1)", 20, side=1)} == {(0, 0, 0, 0)}


def test_randaugment_draws_two_operations_each_with_half_and_all_of_them_alike():
    drawn = [draw_operations(generator("ra", i), 9, 0.5) for i in range(4000)]
    counts = np.bincount([len(chosen) for chosen in drawn], minlength=3) / 4000
    assert np.allclose(counts, [0.25, 0.5, 0.25], atol=0.035)
    each = np.bincount([number for chosen in drawn for number, _ in chosen], minlength=16)[1:] / 4000
    assert np.allclose(each, 1 / 15, atol=5 * math.sqrt(1 / 15 / 4000))
    rotated = np.array([argument for chosen in drawn for number, argument in chosen if number == NUMBERS["rotate"]])
    assert np.abs(rotated).mean() == pytest.approx(27, abs=0.5)
    assert np.abs(rotated).std() == pytest.approx(1.5, abs=0.4)
    assert abs((rotated > 0).mean() - 0.5) < 0.15
    assert max(np.abs(rotated)) <= 30


def test_half_of_the_mixed_views_is_blended_and_half_is_cut():
    mixes = [view.mix for view in views_of("resize|mix(0.8,1)", 3000)]
    kinds = np.bincount([mix.kind if mix else 0 for mix in mixes], minlength=3) / 3000
    assert abs(kinds[MIXUP] - 0.5) < 0.04
    assert abs(kinds[CUTMIX] - 0.5) < 0.04
    shares = np.array([mix.amount / 256 if mix else 0 for mix in mixes if not mix or mix.kind == MIXUP])
    assert shares.mean() == pytest.approx(0.5, abs=0.04)
    assert shares.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.01)  # of Beta(0.8, 0.8)


def test_one_alpha_of_zero_leaves_the_other_kind():
    for line, kind in (("mix(0.8,0)", MIXUP), ("mix(0,1)", CUTMIX)):
        assert {view.mix.kind for view in views_of(f"resize|{line}", 200) if view.mix} == {kind}


@pytest.mark.parametrize("side", [1, 2, 7, 32, 224])
def test_the_amount_of_cutmix_is_the_share_of_its_box(side):
    for view in views_of("resize|mix(0,1)", 400, side=side):
        if view.mix:
            left, top, right, bottom = view.mix.box
            assert 0 <= left < right <= side
            assert 0 <= top < bottom <= side
            assert view.mix.amount == round(256 * (right - left) * (bottom - top) / side**2) > 0


@pytest.mark.parametrize(("start", "n"), [(0, 64), (64, 9), (128, 2), (5, 3)])
def test_partners_are_others_of_the_block_and_all_of_them_alike(start, n):
    block = range(start, start + n)
    drawn_from, chosen = policy("resize|mix(1,0)", 8), np.zeros((n, n))
    for number in range(3000):
        i = start + number % n
        mix = draw(drawn_from, f"{number}", 0, (8, 8), i, block).mix
        if mix:
            assert mix.partner in block
            assert mix.partner != i
            chosen[i - start, mix.partner - start] += 1
    assert chosen.trace() == 0
    totals = chosen.sum(0)
    expected = totals.sum() / n
    assert (np.abs(totals - expected) < 5 * math.sqrt(expected) + 1).all()


def test_a_block_of_one_mixes_nothing_and_the_rest_of_the_view_does_not_depend_on_the_block():
    for i in range(100):
        alone = draw(DEIT, f"{i}", 0, (90, 70), 64, range(64, 65))
        among = draw(DEIT, f"{i}", 0, (90, 70), 64, range(64, 128))
        last = draw(DEIT, f"{i}", 0, (90, 70), 127, range(64, 128))
        assert alone.mix is None
        assert replace(among, mix=None) == alone == replace(last, mix=None)
        if among.mix and last.mix:
            assert replace(among.mix, partner=0) == replace(last.mix, partner=0)
            assert among.mix.partner == last.mix.partner + 1, "the same place among the others"


def test_an_invalid_partner_takes_the_mixing_away_and_nothing_else():
    block, touched = range(64, 84), 0
    for number in range(5):
        views = [draw(DEIT, f"{i}", number, (90, 70), i, block) for i in block]
        views[5] = views[11] = INVALID
        settled = settle(views, block)
        for before, after in zip(views, settled, strict=True):
            if before.mix and before.mix.partner in (69, 75):
                touched += 1
                assert after == replace(before, mix=None)
            else:
                assert after == before
        assert settle(settled, block) == settled
    assert touched > 3


# ---------------------------------------------------------------------------------------------- against timm


@functools.cache
def timm_operations():
    from precompute.taps import timm

    return timm.data.auto_augment


TIMM = {
    "rotate": "Rotate", "shear_x": "ShearX", "shear_y": "ShearY", "translate_x": "TranslateXRel",
    "translate_y": "TranslateYRel", "posterize": "PosterizeIncreasing", "solarize": "SolarizeIncreasing",
    "solarize_add": "SolarizeAdd", "color": "ColorIncreasing", "contrast": "ContrastIncreasing",
    "brightness": "BrightnessIncreasing", "sharpness": "SharpnessIncreasing", "auto_contrast": "AutoContrast",
    "equalize": "Equalize", "invert": "Invert",
}  # fmt: skip


@pytest.mark.parametrize("name", TIMM)
def test_an_operation_does_what_timms_does(images, name):
    theirs = timm_operations().NAME_TO_OP[TIMM[name]]
    for picture, argument in itertools.product(
        ("photo JPEG", "odd PNG", "very wide PNG", "one pixel PNG"), ARGUMENTS[name]
    ):
        image = decode(images[picture])
        arguments = [] if name in ("auto_contrast", "equalize", "invert") else [argument]
        expected = theirs(image, *arguments, resample=Image.Resampling.BICUBIC, fillcolor=FILL)
        found = OPERATIONS[NUMBERS[name]][1](image, argument)
        assert np.array_equal(np.asarray(found), np.asarray(expected)), (picture, argument)
        assert (found.size, found.mode) == (image.size, "RGB")


def test_the_set_and_its_fill_are_timms_increasing_ones():
    auto_augment = timm_operations()
    assert sorted(TIMM.values()) == sorted(auto_augment._RAND_INCREASING_TRANSFORMS)
    mean = timm_operations().__dict__.get("IMAGENET_DEFAULT_MEAN", (0.485, 0.456, 0.406))
    assert tuple(min(255, round(255 * x)) for x in mean) == FILL
    assert auto_augment._LEVEL_DENOM == LEVELS


@pytest.mark.parametrize("name", TIMM)
def test_a_level_means_what_it_means_in_timm(name):
    level_to_argument = timm_operations().LEVEL_TO_ARG[TIMM[name]]
    for level in np.linspace(0, 10, 41):
        if level_to_argument is None:
            assert _argument(name, level / 10, 1.0) == 0
            continue
        theirs = {level_to_argument(level, {})[0] for _ in range(30)}  # either sign
        ours = {_argument(name, level / 10, sign) for sign in (-1.0, 1.0)}
        if name == "posterize":
            theirs = {max(1, bits) for bits in theirs}
        assert sorted(ours) == pytest.approx(sorted(theirs))


# ---------------------------------------------------------------------------------------------- mixing

every = np.arange(256, dtype=np.uint8)
OWN, OTHER = (np.repeat(grid[..., None], 3, -1) for grid in np.meshgrid(every, every, indexing="ij"))


def test_mixup_rounds_the_exact_blend_of_all_pairs_of_values():
    for amount in range(257):
        found = mixed(OWN, OTHER, Mix(MIXUP, 0, amount))
        exact = (OWN[..., 0].astype(np.float64) * (256 - amount) + OTHER[..., 0] * float(amount)) / 256
        assert found.dtype == np.uint8
        assert np.array_equal(found[..., 0], np.floor(exact + 0.5))


def test_mixup_of_all_is_the_partner_and_of_nothing_the_own_image():
    assert np.array_equal(mixed(OWN, OTHER, Mix(MIXUP, 0, 0)), OWN)
    assert np.array_equal(mixed(OWN, OTHER, Mix(MIXUP, 0, 256)), OTHER)
    assert np.array_equal(mixed(OWN, OWN, Mix(MIXUP, 0, 77)), OWN)


def test_mixup_from_either_side_is_the_same():
    for amount in (0, 1, 77, 128, 200, 255, 256):
        assert np.array_equal(mixed(OWN, OTHER, Mix(MIXUP, 0, amount)), mixed(OTHER, OWN, Mix(MIXUP, 0, 256 - amount)))


def test_cutmix_takes_the_box_from_the_partner_and_leaves_both_as_they_were():
    own, other = (np.array(noise(16, 16, seed=seed)) for seed in (1, 2))
    before = own.tobytes(), other.tobytes()
    found = mixed(own, other, Mix(CUTMIX, 0, 77, (3, 0, 9, 16)))
    inside = np.zeros((16, 16), bool)
    inside[0:16, 3:9] = True
    assert np.array_equal(found[inside], other[inside])
    assert np.array_equal(found[~inside], own[~inside])
    found[:] = 0
    assert (own.tobytes(), other.tobytes()) == before
    assert np.array_equal(mixed(own, other, Mix(CUTMIX, 0, 256, (0, 0, 16, 16))), other)


# ---------------------------------------------------------------------------------------------- rendering


def test_operations_come_one_after_another_before_erasing():
    image = noise(20, 20)
    chosen = ((NUMBERS["rotate"], 20.0), (NUMBERS["posterize"], 2.0))
    expected = image
    for number, argument in chosen:
        expected = OPERATIONS[number][1](expected, argument)
    plain = View((0, 0, 20, 20), operations=chosen)
    assert np.array_equal(render(image, plain, 20), np.asarray(expected))
    found = render(image, replace(plain, erased=(2, 3, 9, 19), erase_seed=7), 20)
    inside = np.zeros((20, 20), bool)
    inside[3:19, 2:9] = True
    assert np.array_equal(found[~inside], np.asarray(expected)[~inside])
    noise_bytes = np.random.Generator(np.random.Philox(key=7)).bytes(7 * 16 * 3)
    assert found[inside].tobytes() == noise_bytes


def test_every_drawn_view_of_deit_renders_whatever_the_image_is():
    for size in ((1, 1), (1, 300), (300, 1), (2, 3), (17, 500)):
        buffer = io.BytesIO()
        noise(*size).save(buffer, "PNG")
        for side in (1, 2, 9):
            for i in range(40):
                view = draw(policy("deit", side, 1), f"{i}", 0, size, i, range(64))
                assert render(buffer.getvalue(), view, side).shape == (side, side, 3)
