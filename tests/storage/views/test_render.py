"""Rendering and decoding: the pixels are Pillow's, upright and in RGB, and what cannot be decoded is bad."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from storage.testing import synthetic_image
from storage.views.draw import draw_view
from storage.views.policy import policy
from storage.views.render import MAX_PIXELS, BadImage, decode, render, signature
from storage.views.view import View
from tests.storage.helpers import encoded, noise, same, with_orientation

BICUBIC = Image.Resampling.BICUBIC


# ---------------------------------------------------------------------------------------------- rendering


@pytest.mark.parametrize("size", [(40, 32), (7, 90), (16, 16), (1, 1)])
@pytest.mark.parametrize("side", [1, 16, 50])
def test_resize_is_pillows(size, side):
    image = noise(*size)
    view = draw_view(policy("none", side), "a", 0, size)
    assert same(render(image, view, side), image.resize((side, side), BICUBIC))


def test_bytes_and_decoded_images_render_alike():
    data = encoded(noise(40, 32), "PNG")
    view = draw_view(policy("light", 24), "a", 3, (40, 32))
    pixels = render(data, view, 24)
    assert same(pixels, render(decode(data), view, 24))
    assert pixels.shape == (24, 24, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable


def test_rendering_leaves_the_image_as_it_was():
    image = noise(16, 16)
    before = image.tobytes()
    render(image, View((0, 0, 16, 16), shift=(2, -3), flip=True), 16)[:] = 0
    assert image.tobytes() == before


def test_flipping_mirrors_the_columns_and_twice_is_nothing():
    image = noise(20, 20)
    once = render(image, View((0, 0, 20, 20), flip=True), 20)
    assert same(once, np.asarray(image)[:, ::-1])
    assert same(render(Image.fromarray(once), View((0, 0, 20, 20), flip=True), 20), image)


@pytest.mark.parametrize("shift", [(0, 0), (3, 0), (0, -3), (-4, 4), (19, 19), (20, 0), (0, -25)])
def test_a_shift_moves_the_content_and_fills_with_black(shift):
    pixels = np.asarray(noise(20, 20)) | 1  # nothing black in it
    found = render(Image.fromarray(pixels), View((0, 0, 20, 20), shift=shift), 20)
    padded = np.pad(pixels, ((30, 30), (30, 30), (0, 0)))
    assert same(found, padded[30 - shift[1] : 50 - shift[1], 30 - shift[0] : 50 - shift[0]])


def test_a_flip_comes_after_the_shift():
    image = noise(20, 20)
    plain = render(image, View((0, 0, 20, 20), shift=(5, 2)), 20)
    assert same(render(image, View((0, 0, 20, 20), shift=(5, 2), flip=True), 20), plain[:, ::-1])


@pytest.mark.parametrize(
    ("side", "f", "source"), [(28, 0.875, 64), (28, 0.875, 32), (28, 0.875, 100), (14, 0.875, 53), (16, 0.5, 64)]
)
def test_short_and_center_are_resize_and_crop(side, f, source):
    image = noise(source, source)
    short = round(side / f)
    margin = (short - side) // 2
    resized = np.asarray(image.resize((short, short), BICUBIC))
    view = draw_view(policy(f"short({f})|center", side), "a", 0, image.size)
    assert same(render(image, view, side), resized[margin : margin + side, margin : margin + side])


def test_short_of_one_is_the_middle_square():
    image = noise(50, 30)
    view = draw_view(policy("short(1)|center", 30), "a", 0, image.size)
    assert same(render(image, view, 30), np.asarray(image)[:, 10:40])
    tall = image.transpose(Image.Transpose.TRANSPOSE)
    view = draw_view(policy("crop(0)", 30), "a", 0, tall.size)
    assert same(render(tall, view, 30), np.asarray(tall)[10:40])


@pytest.mark.parametrize("size", [(41, 30), (30, 41), (500, 3), (2, 100), (1, 1)])
@pytest.mark.parametrize("line", ["light", "eval", "none", "short(0.1)|center", "crop(1)|flip"])
def test_every_shape_of_image_renders(line, size):
    image = Image.new("RGB", size, (200, 100, 50))
    drawn_from = policy(line, 16)
    for view in range(3):
        pixels = render(image, draw_view(drawn_from, "a", view, size), 16)
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
def test_a_palette_with_alpha_keeps_its_colors():
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


def test_16_bit_gray_keeps_its_high_byte():
    values = np.array([[0, 255, 256], [32768, 65279, 65535]], np.uint16)
    found = np.asarray(decode(encoded(Image.fromarray(values), "PNG")))
    assert same(found, (values >> 8)[..., None].repeat(3, -1))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
@pytest.mark.parametrize(
    ("orientation", "turned"),
    [
        (1, lambda x: x),
        (2, lambda x: x[:, ::-1]),
        (3, lambda x: x[::-1, ::-1]),
        (4, lambda x: x[::-1]),
        (5, lambda x: x.transpose(1, 0, 2)),
        (6, lambda x: np.rot90(x, -1)),
        (8, lambda x: np.rot90(x)),
    ],
)
def test_images_are_turned_upright(kind, orientation, turned):
    image = noise(9, 7)
    assert same(decode(with_orientation(image, orientation, kind)), turned(np.asarray(image)))


def test_a_jpeg_is_turned_upright():
    image = synthetic_image(1, np.random.default_rng(0))
    plain, turned = decode(encoded(image, "JPEG")), decode(with_orientation(image, 6, "JPEG"))
    assert same(turned, np.rot90(np.asarray(plain), -1))


def test_16_bit_gray_is_turned_upright_too():
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
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
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
    [
        b"",
        b"\0" * 100,
        b"hello",
        encoded(Image.new("RGB", (4, 4)), "GIF"),
        encoded(Image.new("RGB", (4, 4)), "BMP"),
        encoded(Image.new("RGB", (4, 4)), "TIFF"),
        b"\xff\xd8\xff\xe0",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
    ],
    ids=["empty", "zeros", "text", "gif", "bmp", "tiff", "jpeg's beginning", "eps"],
)
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
