"""Hostile images: every one is rendered as documented or refused, and nothing hangs.

What is only damaged, cut off or of another format is in test_rendering.py.
"""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from storage.shards.pack import pack
from storage.views.render import BadImage, decode, render
from storage.views.view import View
from tests.conftest import ROOT
from tests.storage.helpers import by_us, by_webdataset, encoded, same
from tests.storage.views.handmade import (
    BOMBS,
    DEEP,
    PALETTE,
    PIXELS,
    RGB,
    ROWS,
    chunk,
    claiming,
    exif,
    many_scans,
    orientation,
    outcome,
    png,
    rows_of,
    webp_canvas,
)

pytestmark = pytest.mark.usefixtures("never_hangs")


# ---------------------------------------------------------------------------------------------- refused images

REFUSED_IMAGES = {
    "no width": (png((0, 5), 8, 2, bytes(5)), "not a JPEG"),
    "no height": (png((5, 0), 8, 2, b""), "not a JPEG"),
    "a negative width": (png((2**32 - 1, 1), 8, 2, b""), "size"),
    "a JPEG without height": (claiming(encoded(RGB, "JPEG"), 0, 9), "not a JPEG"),
    "a JPEG without width": (claiming(encoded(RGB, "JPEG"), 7, 0), "not a JPEG"),
    "a depth that is none": (png((9, 7), 3, 2, ROWS), "not a JPEG"),
    "a color type that is none": (png((9, 7), 8, 5, ROWS), "not a JPEG"),
    "a filter that is none": (png((9, 7), 8, 2, b"\x09" + ROWS[1:]), "cannot be decoded"),
    "a palette too long": (png((8, 1), 8, 3, bytes(9), chunk(b"PLTE", bytes(900))), "palette"),
    "a frame outside of the picture": (
        png(
            (9, 7),
            8,
            2,
            ROWS,
            chunk(b"acTL", bytes([0, 0, 0, 1]) + bytes(4)),
            chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 9, 7, 2**31, 0, 1, 1, 0, 0)),
        ),
        "cannot be decoded",
    ),
}


@pytest.mark.parametrize("what", REFUSED_IMAGES)
def test_images_that_are_refused(what):
    data, message = REFUSED_IMAGES[what]
    with pytest.raises(BadImage, match=message):
        decode(data)


def test_bombs_take_no_memory_and_nothing_warns():
    program = (
        "import json, resource, warnings\n"
        "from tests.storage.views.handmade import BOMBS, LARGE, RGB, encoded, outcome\n"
        "warnings.simplefilter('error')\n"
        "usual = outcome(encoded(RGB, 'PNG'))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "outcomes = {name: outcome(data) for name, (data, _) in BOMBS.items()}\n"
        "grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "print(json.dumps([usual, outcomes, grown, outcome(LARGE)]))\n"
    )
    child = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    usual, outcomes, grown, large = json.loads(child.stdout)
    assert usual == "rendered"
    for name, (_, message) in BOMBS.items():
        assert message in outcomes[name], name
    assert grown < 100 << (10 if sys.platform != "darwin" else 20)  # KiB; Pillow keeps up to 64 MiB of text
    assert "truncated" in large
    assert child.stderr == ""


def test_honest_images_are_no_bombs():
    assert same(decode(png((9, 7), 8, 2, ROWS + bytes(1 << 20))), PIXELS)  # more data than pixels
    assert same(decode(png((9, 7), 8, 2, ROWS, chunk(b"tEXt", b"k\0" + b"x" * (3 << 20)))), PIXELS)
    assert same(decode(png((9, 7), 8, 2, ROWS, chunk(b"iCCP", b"k\0\0junk"))), PIXELS)
    plain = decode(encoded(RGB, "JPEG"))
    assert same(decode(encoded(RGB, "JPEG", icc_profile=b"x" * (2 << 20))), plain)
    assert decode(many_scans(64, 1000)).size == (64, 64)
    assert decode(webp_canvas(9, 7)).size == (9, 7)
    assert decode(png((100_000, 1), 1, 0, bytes(12501))).size == (100_000, 1)


SVG = (
    b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]>'
    b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><text>&e;</text></svg>'
)
FOREIGN = {
    "SVG": SVG,
    **{kind: encoded(RGB, kind) for kind in ("GIF", "TIFF", "EPS", "ICO", "PDF", "BMP", "TGA", "PPM")},
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_the_content_and_not_the_name_is_the_format_and_nothing_is_executed(tmp_path, monkeypatch, kind, ending):
    def refuse(*arguments: object, **_: object) -> None:
        raise AssertionError(f"executed: {arguments}")

    (tmp_path / "f" / "a").mkdir(parents=True)
    (tmp_path / "f" / "a" / f"x.{ending}").write_bytes(FOREIGN[kind])
    made = pack(str(tmp_path / "f"), str(tmp_path / "x.tar")).train
    for name in ("Popen", "run", "call", "check_call", "check_output"):
        monkeypatch.setattr(subprocess, name, refuse)
    monkeypatch.setattr(os, "system", refuse)
    ((_, found),) = by_us(*made)
    assert found[ending] == FOREIGN[kind]
    with pytest.raises(BadImage, match="not a JPEG, PNG or WebP"):
        decode(found[ending])


def test_any_of_our_formats_is_read_under_any_of_our_names():
    for kind in ("JPEG", "PNG", "WEBP"):
        assert decode(encoded(RGB, kind)).size == (9, 7)  # decode is not told the name


# ---------------------------------------------------------------------------------------------- rendered images


@pytest.mark.parametrize(
    ("color", "channels", "shown"), [(0, 1, [0, 0, 0]), (4, 2, [0, 0, 0]), (2, 3, [0, 1, 2]), (6, 4, [0, 1, 2])]
)
def test_16_bits_keep_their_high_byte(color, channels, shown):
    pixels = DEEP[..., :channels]
    assert same(decode(png((4, 3), 16, color, rows_of(pixels))), pixels[..., shown] >> 8)


@pytest.mark.parametrize(
    ("bits", "byte", "shown"),
    [(1, 0b10100000, [255, 0, 255, 0]), (2, 0b00011011, [0, 85, 170, 255]), (4, 0x0F, [0, 255]), (4, 0x5A, [85, 170])],
)
def test_few_bits_of_gray_go_from_black_to_white(bits, byte, shown):
    found = np.asarray(decode(png((len(shown), 1), bits, 0, bytes([0, byte]))))
    assert found.tolist() == [[[value] * 3 for value in shown]]


def test_palettes_of_any_length_and_alpha_give_their_colors():
    first, second, black = [10, 20, 30], [200, 100, 50], [0, 0, 0]
    indices = bytes([0, 0, 1, 2, 255])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for alpha in ([], [b"\0"], [b"\x80"], [b"\x80\x10"], [bytes(256)], [bytes(1000)]):
            data = png((4, 1), 8, 3, indices, PALETTE, *(chunk(b"tRNS", a) for a in alpha))
            assert np.asarray(decode(data)).tolist() == [[first, second, black, black]]
        few = png((4, 1), 1, 3, b"\0\xa0", PALETTE, chunk(b"tRNS", b"\x80"))
        assert np.asarray(decode(few)).tolist() == [[second, first, second, first]]
        assert not np.asarray(decode(png((4, 1), 8, 3, indices))).any()  # no palette: black


def test_a_transparent_color_is_a_color():
    assert same(decode(png((9, 7), 8, 2, ROWS, chunk(b"tRNS", struct.pack(">HHH", *PIXELS[0, 0])))), PIXELS)
    gray = png((4, 1), 8, 0, bytes([0, 1, 2, 3, 4]), chunk(b"tRNS", b"\xff\xff"))
    assert np.asarray(decode(gray))[0, :, 0].tolist() == [1, 2, 3, 4]
    deep = png((4, 3), 16, 0, rows_of(DEEP[..., :1]), chunk(b"tRNS", DEEP[0, 0, 0].tobytes()))
    assert same(np.asarray(decode(deep))[..., :1], DEEP[..., :1] >> 8)


@pytest.mark.parametrize(
    "name", ["transparency", "exif", "icc_profile", "dpi", "duration", "default_image", "loop", "xmp"]
)
def test_text_that_calls_itself_like_metadata_is_text(name):
    text = chunk(b"tEXt", name.encode() + b"\0(1, x")
    for size, bits, color, rows, chunks in (
        ((9, 7), 8, 2, ROWS, []),
        ((4, 1), 8, 3, bytes(5), [PALETTE]),
        ((4, 1), 8, 0, bytes(5), []),
        ((2, 1), 8, 4, bytes(5), []),
        ((4, 3), 16, 0, rows_of(DEEP[..., :1]), []),
    ):
        plain = decode(png(size, bits, color, rows, *chunks))
        assert same(decode(png(size, bits, color, rows, *chunks, text)), plain)


def test_a_lossless_webp_keeps_the_colors_under_its_alpha():
    pixels = np.dstack([PIXELS, PIXELS[..., 0]])
    data = encoded(Image.fromarray(pixels), "WEBP", lossless=True, exact=True)
    assert Image.open(io.BytesIO(data)).mode == "RGBA"
    assert same(decode(data), PIXELS)


def test_a_cmyk_jpeg_without_adobes_mark_is_not_inverted():
    with_mark = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)
    at = with_mark.index(b"\xff\xee")
    without = with_mark[:at] + with_mark[at + 2 + struct.unpack(">H", with_mark[at + 2 : at + 4])[0] :]
    inverted = np.asarray(Image.open(io.BytesIO(without)))
    assert np.abs(np.asarray(decode(with_mark)).astype(int) - (255, 0, 0)).max() <= 3
    expected = 255 - inverted[..., :3].astype(int)
    assert np.abs(np.asarray(decode(without)).astype(int) - expected * (255 - inverted[..., 3:]) // 255).max() <= 3


CORNERS = np.kron(np.array([[0, 1, 2], [3, 4, 5]]), np.ones((16, 16), int))  # six fields, each of its own color
COLORS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [255, 255, 0]], np.uint8)
TURNED = {
    1: [[0, 1, 2], [3, 4, 5]],
    2: [[2, 1, 0], [5, 4, 3]],
    3: [[5, 4, 3], [2, 1, 0]],
    4: [[3, 4, 5], [0, 1, 2]],
    5: [[0, 3], [1, 4], [2, 5]],
    6: [[3, 0], [4, 1], [5, 2]],
    7: [[5, 2], [4, 1], [3, 0]],
    8: [[2, 5], [1, 4], [0, 3]],
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("number", TURNED)
def test_all_eight_orientations_show_the_same_picture_upright(kind, number):
    settings: dict[str, dict[str, Any]] = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}, "PNG": {}}
    data = encoded(Image.fromarray(COLORS[CORNERS]), kind, exif=exif(orientation(number)), **settings[kind])
    found = np.asarray(decode(data))
    middles = found[8::16, 8::16].astype(int)
    assert np.abs(middles - COLORS[np.array(TURNED[number])]).max() <= 8


ODD_EXIF = {
    "0": [(0x0112, 3, 1, struct.pack("<HH", 0, 0))],
    "9": [orientation(9)],
    "65535": [orientation(65535)],
    "text": [(0x0112, 2, 2, b"6\0\0\0")],
    "bytes": [(0x0112, 7, 4, b"6666")],
    "none": [(0x0112, 3, 0, bytes(4))],
    "more than there are": [(0x0112, 3, 2**31, struct.pack("<I", 8))],
    "a fraction": [(0x0112, 5, 1, struct.pack("<I", 8))],
    "not a number": [(0x0112, 11, 1, struct.pack("<f", float("nan")))],
    "a type that is none": [(0x0112, 99, 1, bytes(4))],
}
TURNED_ALL_THE_SAME = {
    "a second number": [(0x0112, 3, 2, struct.pack("<HH", 6, 3))],
    "a block that is not there": [orientation(6), (0x8769, 4, 1, struct.pack("<I", 2**31))],
    "a block that leads to itself": [orientation(6), (0x8769, 4, 1, struct.pack("<I", 8))],
    "a value that is not there": [orientation(6), (0x9286, 2, 2**30, struct.pack("<I", 2**31))],
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_exif_that_makes_no_sense_turns_nothing_and_what_makes_sense_turns(kind):
    settings = {"lossless": True} if kind == "WEBP" else {}
    for what, entries in ODD_EXIF.items():
        assert same(decode(encoded(RGB, kind, exif=exif(*entries), **settings)), PIXELS), what
    for what, entries in TURNED_ALL_THE_SAME.items():
        turned = np.rot90(PIXELS, -1)
        assert same(decode(encoded(RGB, kind, exif=exif(*entries), **settings)), turned), what


def test_the_first_frame_counts_whatever_an_animation_claims():
    last = Image.fromarray(PIXELS[::-1].copy())
    poster = encoded(RGB, "PNG", save_all=True, default_image=True, append_images=[last])
    assert same(decode(poster), PIXELS)
    frame = chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 9, 7, 0, 0, 1, 1, 0, 0))
    endless = png((9, 7), 8, 2, ROWS, chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)), frame)
    assert same(decode(endless), PIXELS)
    partly = np.asarray(decode(webp_canvas(9, 7)))
    assert partly[0, 0].tolist() == [255, 0, 0]
    assert partly.sum() == 255


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_mended_checksums_let_no_other_error_through():
    chance = np.random.default_rng(0)
    seeds = [
        png((4, 1), 8, 3, bytes(5), PALETTE, chunk(b"tRNS", b"\x80\x10")),
        png((4, 3), 16, 4, rows_of(DEEP[..., :2]), chunk(b"eXIf", exif(orientation(6))[6:])),
        png((9, 7), 8, 2, ROWS, chunk(b"acTL", bytes([0, 0, 0, 1]) + bytes(4)), chunk(b"iTXt", b"k\0\0\0\0\0v")),
        encoded(RGB, "MPO", save_all=True, append_images=[RGB], exif=exif(orientation(6))),
        encoded(RGB.convert("CMYK"), "JPEG", progressive=True),
        webp_canvas(9, 7),
    ]
    for number in range(400):
        bad = bytearray(seeds[number % len(seeds)])
        for at in chance.integers(8, len(bad), 2):
            bad[at] = chance.choice([0, 1, 127, 255, int(chance.integers(256))])
        at = 8
        while bad[:4] == b"\x89PNG" and at + 12 <= len(bad):
            stop = at + 8 + int.from_bytes(bad[at : at + 4], "big")
            if stop + 4 > len(bad):
                break
            bad[stop : stop + 4] = struct.pack(">I", zlib.crc32(bytes(bad[at + 4 : stop])))
            at = stop + 4
        if max(int.from_bytes(bad[i : i + 4], "big") for i in (16, 20)) < 5000 or bad[:4] != b"\x89PNG":
            assert outcome(bytes(bad))


def test_an_image_that_is_bad_is_packed_and_refused_when_it_is_rendered(tmp_path):
    (tmp_path / "f" / "a").mkdir(parents=True)
    for name, data in {
        "empty": b"",
        "bomb": BOMBS["the largest canvas"][0],
        "zero": REFUSED_IMAGES["no width"][0],
    }.items():
        (tmp_path / "f" / "a" / f"{name}.png").write_bytes(data)
    made = pack(str(tmp_path / "f"), str(tmp_path / "x.tar")).train
    assert by_us(*made) == by_webdataset(*made)
    for _, found in by_us(*made):
        with pytest.raises(BadImage):
            render(found["png"], View((0, 0, 4, 4)), 4)
