"""The operations of `deit`: the same bytes and the same draws in any process, and what timm's operations do."""

from __future__ import annotations

import functools
import io
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from storage.views.draw import draw_view
from storage.views.mixing import mix_images
from storage.views.policy import policy
from storage.views.randaugment import FILL, LEVELS, OPERATIONS, _argument
from storage.views.render import decode, render
from storage.views.view import CUTMIX, MIXUP, Mix, View
from tests.conftest import ROOT
from tests.storage.helpers import noise, optional_features
from tests.storage.views.operations import (
    ARGUMENTS,
    NUMBERS,
    digest,
    draw_digests,
    drawn_view,
    jobs,
    pictures,
    pixel_digests,
)


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
    "MALLOC_PERTURB_": "165",
    "PYTHONHASHSEED": "1",
    **{name: value for setting in SETTINGS.values() for name, value in setting.items()},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_contract_2_every_operation_of_deit_gives_the_same_bytes_in_another_process(images, here, setting):
    program = "from tests.storage.views.test_operations import answer; answer()"
    if "ATEN_CPU_CAPABILITY" in SETTINGS[setting]:  # it counts, if at all, where torch is there
        program = "import torch; torch.set_flush_denormal(True); torch.ones(9).exp().sum(); " + program
    child = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, **SETTINGS[setting]},
        input=json.dumps({name: data.hex() for name, data in images.items()}),
        capture_output=True,
        text=True,
    )
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


# ---------------------------------------------------------------------------------------------- against timm


@functools.cache
def timm_operations():
    import timm

    return timm.data.auto_augment


TIMM = {
    "rotate": "Rotate",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateXRel",
    "translate_y": "TranslateYRel",
    "posterize": "PosterizeIncreasing",
    "solarize": "SolarizeIncreasing",
    "solarize_add": "SolarizeAdd",
    "color": "ColorIncreasing",
    "contrast": "ContrastIncreasing",
    "brightness": "BrightnessIncreasing",
    "sharpness": "SharpnessIncreasing",
    "auto_contrast": "AutoContrast",
    "equalize": "Equalize",
    "invert": "Invert",
}


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
    assert sorted(TIMM.values()) == sorted(auto_augment._RAND_INCREASING_TRANSFORMS)  # noqa: SLF001 - timm's lists
    mean = timm_operations().__dict__.get("IMAGENET_DEFAULT_MEAN", (0.485, 0.456, 0.406))
    assert tuple(min(255, round(255 * x)) for x in mean) == FILL
    assert auto_augment._LEVEL_DENOM == LEVELS  # noqa: SLF001


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
        found = mix_images(OWN, OTHER, Mix(kind=MIXUP, partner=0, amount=amount))
        exact = (OWN[..., 0].astype(np.float64) * (256 - amount) + OTHER[..., 0] * float(amount)) / 256
        assert found.dtype == np.uint8
        assert np.array_equal(found[..., 0], np.floor(exact + 0.5))


def test_mixup_of_all_is_the_partner_and_of_nothing_the_own_image():
    assert np.array_equal(mix_images(OWN, OTHER, Mix(kind=MIXUP, partner=0, amount=0)), OWN)
    assert np.array_equal(mix_images(OWN, OTHER, Mix(kind=MIXUP, partner=0, amount=256)), OTHER)
    assert np.array_equal(mix_images(OWN, OWN, Mix(kind=MIXUP, partner=0, amount=77)), OWN)


def test_mixup_from_either_side_is_the_same():
    for amount in (0, 1, 77, 128, 200, 255, 256):
        assert np.array_equal(
            mix_images(OWN, OTHER, Mix(kind=MIXUP, partner=0, amount=amount)),
            mix_images(OTHER, OWN, Mix(kind=MIXUP, partner=0, amount=256 - amount)),
        )


def test_cutmix_takes_the_box_from_the_partner_and_leaves_both_as_they_were():
    own, other = (np.array(noise(16, 16, seed=seed)) for seed in (1, 2))
    before = own.tobytes(), other.tobytes()
    found = mix_images(own, other, Mix(kind=CUTMIX, partner=0, amount=77, box=(3, 0, 9, 16)))
    inside = np.zeros((16, 16), bool)
    inside[0:16, 3:9] = True
    assert np.array_equal(found[inside], other[inside])
    assert np.array_equal(found[~inside], own[~inside])
    found[:] = 0
    assert (own.tobytes(), other.tobytes()) == before
    assert np.array_equal(mix_images(own, other, Mix(kind=CUTMIX, partner=0, amount=256, box=(0, 0, 16, 16))), other)


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
                view = draw_view(policy("deit", side, 1), f"{i}", 0, size, i=i, block=range(64))
                assert render(buffer.getvalue(), view, side).shape == (side, side, 3)
