"""Policies and views: one spelling a policy, draws that depend on their arguments alone, pixels that never differ."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from storage.banks import describe, policy_of
from storage.errors import UserError
from storage.policies import NAMED, OPERATIONS_VERSION, policy
from storage.testing import synthetic_image
from storage.views import COLUMNS, INVALID, MAX_PIXELS, BadImage, View, decode, draw, generator, render, signature

BICUBIC = Image.Resampling.BICUBIC


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """An image in which every pixel matters."""
    channels = {"RGB": 3, "RGBA": 4, "CMYK": 4, "LA": 2}.get(mode)
    shape = (height, width, channels) if channels else (height, width)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    return Image.frombytes(mode, (width, height), pixels.tobytes())


def encoded(image: Image.Image, kind: str, **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def whole(image: Image.Image) -> View:
    return View((0, 0, image.width, image.height))


def same(found, expected) -> bool:
    return np.array_equal(np.asarray(found), np.asarray(expected))


# ---------------------------------------------------------------------------------------------- policies


@pytest.mark.parametrize(("name", "line"), NAMED.items())
def test_a_name_is_its_line(name, line):
    assert policy(name, 32, 5) == policy(line, 32, 5)
    assert policy(name, 32).line == line
    assert policy(name, 32).name == name
    assert policy(name, 32).bank.startswith(f"{name}-32-")


@pytest.mark.parametrize(
    "line", ["crop( .125 ) | flip", " crop(0.1250)|flip", "crop(1.25e-1)|flip ", "crop(+.125)|flip()", "\tlight"]
)
def test_every_spelling_of_a_policy_is_the_same_policy(line):
    assert policy(line, 32) == policy("light", 32)
    assert policy(line, 32).bank == policy("light", 32).bank


def test_zero_has_one_spelling():
    assert policy("crop(-0)|flip", 32) == policy("crop(0.0)|flip", 32)


@pytest.mark.parametrize(
    "line", ["resize", "resize|flip", "short(0.5)|center", "short(1)|center|flip", "crop(0)", "crop(1)|flip"]
)
def test_a_normal_line_is_its_own_normal_line(line):
    assert policy(line, 16).line == line
    assert policy(policy(line, 16).line, 16) == policy(line, 16)


REFUSED = {
    "no operation": ("", "no operation is called ''"),
    "unknown operation": ("corp(0.1)|flip", "'corp'.*Did you mean 'crop'"),
    "unknown name": ("ligth", "'ligth'.*Did you mean 'light'"),
    "operation in capitals": ("Resize", "Did you mean 'resize'"),
    "not in order": ("resize|erase(0.1)|flip", "each once and in this order"),
    "rrc the wrong way round": ("rrc(1,0.08)", "rrc.lo,hi. takes"),
    "rrc of nothing": ("rrc(0,1)", "rrc.lo,hi. takes"),
    "randaug too strong": ("resize|randaug(11,0.5)", "randaug.m,std. takes"),
    "erase of no part": ("resize|erase(0)", "erase.p. takes"),
    "mix of nothing": ("resize|mix(0,0)", "mix.mixup,cutmix. takes"),
    "mix of no number": ("resize|mix(nan,1)", "mix.mixup,cutmix. takes"),
    "too few arguments": ("crop|flip", r"crop takes 1 argument\(s\), found 0"),
    "too many arguments": ("short(1,2)|center", r"short takes 1 argument\(s\), found 2"),
    "an argument too many": ("resize(3)", r"resize takes 0 argument\(s\), found 1"),
    "no number": ("crop(x)|flip", "arguments are numbers"),
    "no number after a comma": ("crop(0.1,)|flip", "arguments are numbers"),
    "a bracket that does not close": ("crop(0.1|flip", "no operation"),
    "short too small": ("short(0.09)|center", r"short\(f\)"),
    "short too large": ("short(1.01)|center", r"short\(f\)"),
    "border too large": ("crop(1.5)", r"crop\(p\)"),
    "border below zero": ("crop(-0.1)", r"crop\(p\)"),
    "no number at all": ("crop(nan)", r"crop\(p\)"),
    "infinite": ("short(inf)|center", r"short\(f\)"),
    "no framing": ("flip", "must begin with"),
    "short without center": ("short(0.5)|flip", "must begin with"),
    "center without short": ("center", "must begin with"),
    "center before short": ("center|short(0.5)", "must begin with"),
    "flip first": ("flip|resize", "must begin with"),
    "flip twice": ("resize|flip|flip", "may follow flip, randaug, erase, mix, each once"),
    "two framings": ("resize|crop(0.1)", "may follow flip, randaug, erase, mix"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what):
    line, message = REFUSED[what]
    with pytest.raises(UserError, match=message):
        policy(line, 32)


@pytest.mark.parametrize(("size", "seed"), [(0, 0), (-1, 0), (4097, 0), (32, -1), (32, 2**63)])
def test_sizes_and_seeds_have_bounds(size, seed):
    with pytest.raises(UserError, match="expected"):
        policy("light", size, seed)
    policy("light", 4096, 2**63 - 1)


def test_the_bank_changes_with_line_size_and_seed():
    policies = [policy("light", 32), policy("resize|flip", 32), policy("light", 64), policy("light", 32, 1)]
    assert len({p.bank for p in policies}) == 4


def test_without_chance_the_seed_is_no_part_of_the_bank():
    for line in ("none", "eval", "short(1)|center"):
        assert not policy(line, 32).random
        assert policy(line, 32, 7).bank == policy(line, 32).bank
    for line in ("light", "crop(0.1)", "resize|flip"):
        assert policy(line, 32).random


def test_the_bank_changes_with_the_version_of_the_operations(monkeypatch):
    before = policy("light", 32).bank
    monkeypatch.setattr("storage.policies.OPERATIONS_VERSION", OPERATIONS_VERSION + 1)
    assert policy("light", 32).bank != before


@pytest.mark.parametrize("line", ["light", "eval", "none", "crop(0.3)"])
def test_the_policy_of_a_bank_is_read_back_from_its_manifest(line):
    drawn_from = policy(line, 48, 9 if policy(line, 48).random else 0)
    manifest = json.loads(json.dumps({"identity": drawn_from.identity, **describe(drawn_from)}))
    assert policy_of(manifest) == drawn_from


@pytest.mark.parametrize("line", ["light", "none", "resize|flip", "eval"])
def test_the_evaluation_view_leaves_nothing_to_chance(line):
    evaluation = policy(line, 48, 3).evaluation
    assert (evaluation.line, evaluation.size, evaluation.random) == ("short(1)|center", 48, False)


# ---------------------------------------------------------------------------------------------- draws

keys = st.text(max_size=8)
sizes = st.tuples(st.integers(1, 300), st.integers(1, 300))


@given(
    st.sampled_from(["light", "eval", "none", "crop(1)|flip"]),
    st.integers(0, 2**63 - 1),
    keys,
    st.integers(0, 99),
    sizes,
)
@settings(max_examples=60, deadline=None)
def test_a_draw_depends_on_its_arguments_alone(line, seed, key, view, size):
    first = draw(policy(line, 24, seed), key, view, size)
    np.random.default_rng().random()
    draw(policy(line, 24, seed), key, view + 1, size)
    assert draw(policy(line, 24, seed), key, view, size) == first


@given(keys, st.integers(0, 99), sizes)
@settings(max_examples=40, deadline=None)
def test_views_without_chance_are_all_the_same(key, view, size):
    for line in ("eval", "none", "short(0.3)|center"):
        assert draw(policy(line, 24, 1), key, view, size) == draw(policy(line, 24), "other", 0, size)


@given(keys, st.integers(0, 2**63 - 1), sizes)
@settings(max_examples=60, deadline=None)
def test_boxes_lie_within_the_image_and_shifts_within_the_border(key, seed, size):
    for line in ("light", "eval", "none", "crop(0.5)", "short(0.1)|center"):
        drawn = draw(policy(line, 24, seed), key, 0, size)
        left, top, right, bottom = drawn.box
        assert -1e-9 <= left < right <= size[0] + 1e-9
        assert -1e-9 <= top < bottom <= size[1] + 1e-9
        if line != "none":
            assert right - left == pytest.approx(bottom - top)
        border = {"light": 3, "crop(0.5)": 12}.get(line, 0)
        assert max(map(abs, drawn.shift)) <= border
        assert drawn.flip in ((False, True) if line == "light" else (False,))


def test_draws_differ_over_keys_views_and_seeds_and_take_all_values():
    light = policy("light", 32)
    over = {
        "views": [draw(light, "a", view, (40, 40)) for view in range(400)],
        "keys": [draw(light, f"{i}", 0, (40, 40)) for i in range(400)],
        "seeds": [draw(policy("light", 32, seed), "a", 0, (40, 40)) for seed in range(400)],
    }
    for views in over.values():
        assert {view.shift[0] for view in views} == {view.shift[1] for view in views} == set(range(-4, 5))
        assert 150 < sum(view.flip for view in views) < 250
        assert len({(view.shift, view.flip) for view in views}) > 100


def test_the_size_of_an_image_does_not_change_its_chance():
    light = policy("light", 32)
    for view in range(20):
        small, large = (draw(light, "a", view, size) for size in ((40, 30), (400, 500)))
        assert (small.shift, small.flip) == (large.shift, large.flip)


def test_generators_of_other_arguments_differ():
    arguments = [("a", 1), ("a", "1"), ("a1",), ("a", 1, None), ("a", [1]), (1, "a"), ("a", 1.5)]
    assert len({int(generator(*several).integers(2**62)) for several in arguments}) == len(arguments)
    assert generator("a", 1).integers(2**62) == generator("a", 1).integers(2**62)


coordinates = st.floats(-1e6, 1e6)


@given(
    st.tuples(coordinates, coordinates, coordinates, coordinates),
    st.tuples(st.integers(-4096, 4096), st.integers(-4096, 4096)), st.booleans(), st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_a_row_of_a_bank_is_its_view(box, shift, flip, valid):
    view = View(box, shift, flip, valid)
    row = view.row()
    assert View.of(row) == view
    assert (row.shape, row.dtype) == ((len(COLUMNS),), np.float64)
    assert dict(zip(COLUMNS, row, strict=True))["flip"] == flip
    assert dict(zip(COLUMNS, row, strict=True))["partner"] == -1


def test_an_invalid_view_says_so_in_its_row():
    assert not View.of(INVALID.row()).valid
    assert INVALID.row()[COLUMNS.index("valid")] == 0
    assert len(set(COLUMNS)) == len(COLUMNS)


# ---------------------------------------------------------------------------------------------- rendering


@pytest.mark.parametrize("size", [(40, 32), (7, 90), (16, 16), (1, 1)])
@pytest.mark.parametrize("side", [1, 16, 50])
def test_resize_is_pillows(size, side):
    image = noise(*size)
    view = draw(policy("none", side), "a", 0, size)
    assert same(render(image, view, side), image.resize((side, side), BICUBIC))


def test_bytes_and_decoded_images_render_alike():
    data = encoded(noise(40, 32), "PNG")
    view = draw(policy("light", 24), "a", 3, (40, 32))
    pixels = render(data, view, 24)
    assert same(pixels, render(decode(data), view, 24))
    assert (pixels.shape, pixels.dtype) == ((24, 24, 3), np.uint8)
    assert pixels.flags.writeable


def test_rendering_leaves_the_image_as_it_was():
    image = noise(16, 16)
    before = image.tobytes()
    render(image, View((0, 0, 16, 16), (2, -3), True), 16)[:] = 0
    assert image.tobytes() == before


def test_flipping_mirrors_the_columns_and_twice_is_nothing():
    image = noise(20, 20)
    once = render(image, View((0, 0, 20, 20), flip=True), 20)
    assert same(once, np.asarray(image)[:, ::-1])
    assert same(render(Image.fromarray(once), View((0, 0, 20, 20), flip=True), 20), image)


@pytest.mark.parametrize("shift", [(0, 0), (3, 0), (0, -3), (-4, 4), (19, 19), (20, 0), (0, -25)])
def test_a_shift_moves_the_content_and_fills_with_black(shift):
    pixels = np.asarray(noise(20, 20)) | 1  # nothing black in it
    found = render(Image.fromarray(pixels), View((0, 0, 20, 20), shift), 20)
    padded = np.pad(pixels, ((30, 30), (30, 30), (0, 0)))
    assert same(found, padded[30 - shift[1] : 50 - shift[1], 30 - shift[0] : 50 - shift[0]])


def test_a_flip_comes_after_the_shift():
    image = noise(20, 20)
    plain = render(image, View((0, 0, 20, 20), (5, 2)), 20)
    assert same(render(image, View((0, 0, 20, 20), (5, 2), True), 20), plain[:, ::-1])


@pytest.mark.parametrize(
    ("side", "f", "source"), [(28, 0.875, 64), (28, 0.875, 32), (28, 0.875, 100), (14, 0.875, 53), (16, 0.5, 64)]
)
def test_short_and_center_are_resize_and_crop(side, f, source):
    image = noise(source, source)
    short = round(side / f)
    margin = (short - side) // 2
    resized = np.asarray(image.resize((short, short), BICUBIC))
    view = draw(policy(f"short({f})|center", side), "a", 0, image.size)
    assert same(render(image, view, side), resized[margin : margin + side, margin : margin + side])


def test_short_of_one_is_the_middle_square():
    image = noise(50, 30)
    view = draw(policy("short(1)|center", 30), "a", 0, image.size)
    assert same(render(image, view, 30), np.asarray(image)[:, 10:40])
    tall = image.transpose(Image.Transpose.TRANSPOSE)
    view = draw(policy("crop(0)", 30), "a", 0, tall.size)
    assert same(render(tall, view, 30), np.asarray(tall)[10:40])


@pytest.mark.parametrize("size", [(41, 30), (30, 41), (500, 3), (2, 100), (1, 1)])
@pytest.mark.parametrize("line", ["light", "eval", "none", "short(0.1)|center", "crop(1)|flip"])
def test_every_shape_of_image_renders(line, size):
    image = Image.new("RGB", size, (200, 100, 50))
    drawn_from = policy(line, 16)
    for view in range(3):
        pixels = render(image, draw(drawn_from, "a", view, size), 16)
        assert {tuple(p) for p in pixels.reshape(-1, 3).tolist()} <= {(200, 100, 50), (0, 0, 0)}


def test_a_signature_is_of_the_pixels():
    pixels = np.asarray(noise(8, 8))
    assert signature(pixels) == signature(np.ascontiguousarray(pixels[:, ::-1])[:, ::-1])
    changed = pixels.copy()
    changed[3, 3, 1] ^= 1
    assert signature(pixels) != signature(changed)
    assert signature(np.frombuffer(b"123456789", np.uint8)) == 0xE3069283  # the check value of crc32c


# ---------------------------------------------------------------------------------------------- decoding


def test_pixels_of_lossless_images_come_as_they_are():
    image = noise(9, 7)
    assert same(decode(encoded(image, "PNG")), image)
    assert same(decode(encoded(image, "WEBP", lossless=True)), image)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "1", "P"])
def test_other_modes_become_rgb_and_alpha_is_dropped(mode):
    image = noise(9, 7).convert(mode) if mode in "1P" else noise(9, 7, mode)
    found = decode(encoded(image, "PNG"))
    assert found.mode == "RGB"
    assert same(found, image.convert("RGB"))
    if mode == "RGBA":
        assert same(found, np.asarray(image)[..., :3])
    if mode == "LA":
        assert same(found, np.asarray(image)[..., :1].repeat(3, -1))


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_a_palette_with_alpha_keeps_its_colours():
    image = Image.new("P", (2, 2))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1, 1, 0])
    found = decode(encoded(image, "PNG", transparency=bytes([0, 128])))
    assert same(found, np.array([[(10, 20, 30), (200, 100, 50)], [(200, 100, 50), (10, 20, 30)]]))


def test_a_cmyk_jpeg_becomes_rgb():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red
    data = encoded(image, "JPEG", quality=100)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    found = decode(data)
    assert found.mode == "RGB"
    assert np.abs(np.asarray(found).astype(int) - (255, 0, 0)).max() <= 3


def test_16_bit_grey_keeps_its_high_byte():
    values = np.array([[0, 255, 256], [32768, 65279, 65535]], np.uint16)
    found = np.asarray(decode(encoded(Image.fromarray(values), "PNG")))
    assert same(found, (values >> 8)[..., None].repeat(3, -1))


def with_orientation(image: Image.Image, orientation: int, kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
@pytest.mark.parametrize(
    ("orientation", "turned"),
    [
        (1, lambda x: x), (2, lambda x: x[:, ::-1]), (3, lambda x: x[::-1, ::-1]), (4, lambda x: x[::-1]),
        (5, lambda x: x.transpose(1, 0, 2)), (6, lambda x: np.rot90(x, -1)), (8, lambda x: np.rot90(x)),
    ],
)  # fmt: skip
def test_images_are_turned_upright(kind, orientation, turned):
    image = noise(9, 7)
    assert same(decode(with_orientation(image, orientation, kind)), turned(np.asarray(image)))


def test_a_jpeg_is_turned_upright():
    image = synthetic_image(1, np.random.default_rng(0))
    plain, turned = decode(encoded(image, "JPEG")), decode(with_orientation(image, 6, "JPEG"))
    assert same(turned, np.rot90(np.asarray(plain), -1))


def test_16_bit_grey_is_turned_upright_too():
    values = np.arange(6, dtype=np.uint16).reshape(2, 3) * 1000
    found = decode(with_orientation(Image.fromarray(values), 6, "PNG"))
    assert same(np.asarray(found)[..., 0], np.rot90(values >> 8, -1))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_metadata_that_cannot_be_read_does_not_make_an_image_bad(kind):
    image = noise(9, 7)
    assert same(decode(encoded(image, kind, exif=b"Exif\0\0no tiff at all")), decode(encoded(image, kind)))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_the_first_frame_of_an_animation_counts(kind):
    frames = [noise(9, 7, seed=seed) for seed in range(3)]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=40, **lossless)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert same(decode(data), frames[0])


def test_a_jpeg_of_several_pictures_gives_the_first():
    frames = [noise(16, 16, seed=seed) for seed in range(2)]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert same(decode(data), decode(encoded(frames[0], "JPEG")))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_every_cut_of_an_image_is_bad_or_still_all_of_its_pixels(kind):
    data = encoded(noise(16, 12), kind)
    pixels, bad = np.asarray(decode(data)), 0
    for cut in range(len(data)):
        try:
            assert same(decode(data[:cut]), pixels)
        except BadImage:
            bad += 1
    assert bad >= len(data) - 20  # a PNG's checksum and closing chunk hold no pixels


@pytest.mark.parametrize(
    "data",
    [b"", b"\0" * 100, b"hello", encoded(Image.new("RGB", (4, 4)), "GIF"), encoded(Image.new("RGB", (4, 4)), "BMP"),
     encoded(Image.new("RGB", (4, 4)), "TIFF"), b"\xff\xd8\xff\xe0", b"%!PS-Adobe-3.0 EPSF-3.0\n"],
    ids=["empty", "zeros", "text", "gif", "bmp", "tiff", "jpeg's beginning", "eps"],
)  # fmt: skip
def test_bytes_that_are_no_image_of_ours_are_bad(data):
    with pytest.raises(BadImage):
        decode(data)
    with pytest.raises(BadImage):
        render(data, View((0, 0, 4, 4)), 4)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bad_bytes_never_raise_anything_else():
    chance = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP"):
        data = with_orientation(noise(8, 8), 6, kind)
        for _ in range(150):
            bad = bytearray(data)
            for at in chance.integers(0, len(bad), 3):
                bad[at] = chance.integers(256)
            try:
                assert decode(bytes(bad)).mode == "RGB"
            except BadImage as error:
                assert str(error)  # noqa: PT017


def huge_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be large."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")


def huge_jpeg(width: int, height: int) -> bytes:
    """A small JPEG whose header claims a large size."""
    data = bytearray(encoded(noise(16, 16), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize("data", [huge_png(60000, 60000), huge_png(2**31 - 1, 2**31 - 1), huge_jpeg(65500, 65500)])
def test_a_bomb_is_bad_before_it_takes_memory(data):
    tracemalloc.start()
    try:
        with pytest.raises(BadImage, match=r"pixels|size"):
            decode(data)
        assert tracemalloc.get_traced_memory()[1] < 5 << 20
    finally:
        tracemalloc.stop()
    assert MAX_PIXELS < 60000 * 60000


def test_our_limit_holds_where_pillows_is_off(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(BadImage, match="60000x3000 pixels"):
        decode(huge_png(60000, 3000))


# ---------------------------------------------------------------------------------------------- contract 2


def optional_features() -> str:
    """What this processor has of NumPy's dispatched features."""
    from numpy._core import _multiarray_umath as umath

    return " ".join(name for name in umath.__cpu_dispatch__ if umath.__cpu_features__.get(name))


def signatures_of(images: list[bytes]) -> list[int]:
    """Of views of `light` and `eval` of some images."""
    return [
        signature(render(data, draw(policy(line, 24, 5), f"key {i}", view, decode(data).size), 24))
        for i, data in enumerate(images)
        for line in ("light", "eval")
        for view in range(2)
    ]


@pytest.mark.parametrize("setting", ["OMP_NUM_THREADS", "JSIMD_FORCENONE", "NPY_DISABLE_CPU_FEATURES"])
def test_replay_equals_record_in_another_process(tmp_path, setting):
    value = {"OMP_NUM_THREADS": "2", "JSIMD_FORCENONE": "1", "NPY_DISABLE_CPU_FEATURES": optional_features()}[setting]
    images = [
        encoded(synthetic_image(label, generator("child", label), size), kind)
        for label, size in enumerate([(40, 32), (61, 47), (33, 90)])
        for kind in ("PNG", "JPEG", "WEBP")
    ]
    (tmp_path / "images.json").write_text(json.dumps([data.hex() for data in images]))
    program = (
        "import json, sys\n"
        "from tests.storage.test_policies_views import signatures_of\n"
        "images = [bytes.fromhex(text) for text in json.load(open(sys.argv[1]))]\n"
        "print(json.dumps(signatures_of(images)))\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "images.json")],
        cwd=Path(__file__).parents[2], env={**os.environ, setting: value}, capture_output=True, check=True, text=True,
    )  # fmt: skip
    assert json.loads(child.stdout) == signatures_of(images)
    assert len(set(signatures_of(images))) > 20
