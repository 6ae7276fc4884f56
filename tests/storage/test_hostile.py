"""Hostile input: every image is rendered as documented or refused, every tar is read or refused, and nothing hangs.

What is only damaged, cut off or of another format is in test_policies_views.py and test_shards.py.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import tarfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from storage.errors import UserError
from storage.pack import pack
from storage.policies import policy
from storage.shards import build_index, classes_of, read_samples
from storage.tars import LARGEST, as_sample, members
from storage.views import MAX_PIXELS, BadImage, View, decode, draw, render
from tests.storage.helpers import by_us, by_webdataset, picture, samples, write_tar


@pytest.fixture(autouse=True)
def _never_hangs():
    def stop(*_: object) -> None:
        pytest.fail("it hangs")  # no Exception, so nobody takes it for a bad image

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------------------------------------- images by hand


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(size: tuple[int, int], bits: int, colour: int, rows: bytes, *chunks: bytes, after: bytes = b"") -> bytes:
    """A PNG with any header; `rows` begin with their filter's number. Pillow writes only some of these."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, colour, 0, 0, 0))
    return b"".join(
        [b"\x89PNG\r\n\x1a\n", header, *chunks, chunk(b"IDAT", zlib.compress(rows)), after, chunk(b"IEND", b"")]
    )


def rows_of(pixels: np.ndarray) -> bytes:
    return b"".join(b"\0" + row.tobytes() for row in pixels)


def encoded(image: Image.Image, kind: str, **settings: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """An EXIF block of (tag, type, count, value or offset)."""
    body = b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries))
    return b"Exif\0\0" + body + b"".join(struct.pack("<HHI", *e[:3]) + e[3] for e in entries) + bytes(4)


def orientation(number: int) -> tuple[int, int, int, bytes]:
    return 0x0112, 3, 1, struct.pack("<HH", number, 0)


def claiming(data: bytes, height: int, width: int) -> bytes:
    """A JPEG whose header claims another size."""
    at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2")) + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def webp_canvas(width: int, height: int) -> bytes:
    """An animated WebP of one small frame on a canvas of this size."""
    frame = encoded(Image.new("RGBA", (1, 1), (255, 0, 0, 255)), "WEBP", lossless=True)[12:]
    content = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0"
    content += struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    content += b"ANIM" + struct.pack("<I", 6) + bytes(6)
    content += b"ANMF" + struct.pack("<I", 16 + len(frame)) + bytes(16) + frame
    return b"RIFF" + struct.pack("<I", len(content)) + content


def many_scans(side: int, count: int) -> bytes:
    """A progressive JPEG that repeats an empty scan."""
    data = claiming(encoded(RGB, "JPEG", progressive=True), side, side)
    second = data.index(b"\xff\xda", data.index(b"\xff\xda") + 2)
    scan = data[second : second + 2 + struct.unpack(">H", data[second + 2 : second + 4])[0]]
    return data[:-2] + scan * count + data[-2:]


PIXELS = np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8)
DEEP = np.random.default_rng(1).integers(0, 65536, (3, 4, 4), np.uint16).astype(">u2")
RGB = Image.fromarray(PIXELS)
ROWS = rows_of(PIXELS)
PALETTE = chunk(b"PLTE", bytes([10, 20, 30, 200, 100, 50]))
BOMB = zlib.compress(bytes(64 << 20), 9)


def text_bombs() -> dict[str, bytes]:
    chunks = {
        "zTXt": chunk(b"zTXt", b"k\0\0" + BOMB),
        "iTXt": chunk(b"iTXt", b"k\0\1\0\0\0" + BOMB),
        "iCCP": chunk(b"iCCP", b"k\0\0" + BOMB),
        "many zTXt": b"".join(chunk(b"zTXt", b"k%d\0\0" % i + zlib.compress(bytes(1_000_000))) for i in range(80)),
    }
    found = {f"{name} before": png((9, 7), 8, 2, ROWS, data) for name, data in chunks.items()}
    return {**found, **{f"{name} after": png((9, 7), 8, 2, ROWS, after=data) for name, data in chunks.items()}}


BOMBS = {
    **{name: (data, "TEXT") for name, data in text_bombs().items()},
    "a canvas over the limit": (webp_canvas(16383, 16383), "pixels"),
    "the largest canvas": (webp_canvas(2**24, 2**24), "pixels"),
    "a long line": (png((MAX_PIXELS, 1), 1, 0, bytes(9)), "178956970x1 pixels, more than"),
    "a tall line": (png((1, 1_000_001), 1, 0, bytes(9)), "1x1000001 pixels, more than"),
    "many scans": (many_scans(13000, 300), "13000x13000 pixels in 310 scans"),
}
LARGE = png((10000, 9000), 1, 0, bytes(9))  # within our limit, and over the one from which Pillow warns


def outcome(data: bytes) -> str:
    try:
        image = decode(data)
        render(image, draw(policy("eval", 16), "a", 0, image.size), 16)
    except BadImage as error:
        return str(error)
    return "rendered"


# ---------------------------------------------------------------------------------------------- refused images

REFUSED_IMAGES = {
    "no width": (png((0, 5), 8, 2, bytes(5)), "no JPEG"),
    "no height": (png((5, 0), 8, 2, b""), "no JPEG"),
    "a negative width": (png((2**32 - 1, 1), 8, 2, b""), "size"),
    "a JPEG without height": (claiming(encoded(RGB, "JPEG"), 0, 9), "no JPEG"),
    "a JPEG without width": (claiming(encoded(RGB, "JPEG"), 7, 0), "no JPEG"),
    "a depth that is none": (png((9, 7), 3, 2, ROWS), "no JPEG"),
    "a colour type that is none": (png((9, 7), 8, 5, ROWS), "no JPEG"),
    "a filter that is none": (png((9, 7), 8, 2, b"\x09" + ROWS[1:]), "cannot be decoded"),
    "a palette too long": (png((8, 1), 8, 3, bytes(9), chunk(b"PLTE", bytes(900))), "palette"),
    "text for a frame's box": (png((9, 7), 8, 2, ROWS, chunk(b"tEXt", b"bbox\0x")), "cannot be decoded"),
    "a frame outside of the picture": (
        png((9, 7), 8, 2, ROWS, chunk(b"acTL", bytes([0, 0, 0, 1]) + bytes(4)),
            chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 9, 7, 2**31, 0, 1, 1, 0, 0))),
        "cannot be decoded",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED_IMAGES)
def test_images_that_are_refused(what):
    data, message = REFUSED_IMAGES[what]
    with pytest.raises(BadImage, match=message):
        decode(data)


def test_bombs_take_no_memory_and_nothing_warns():
    program = (
        "import json, resource, warnings\n"
        "from tests.storage.test_hostile import BOMBS, LARGE, RGB, encoded, outcome\n"
        "warnings.simplefilter('error')\n"
        "usual = outcome(encoded(RGB, 'PNG'))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "outcomes = {name: outcome(data) for name, (data, _) in BOMBS.items()}\n"
        "grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "print(json.dumps([usual, outcomes, grown, outcome(LARGE)]))\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    usual, outcomes, grown, large = json.loads(child.stdout)
    assert usual == "rendered"
    for name, (_, message) in BOMBS.items():
        assert message in outcomes[name], name
    assert grown < 100 << (10 if sys.platform != "darwin" else 20)  # KiB; Pillow keeps up to 64 MiB of text
    assert "truncated" in large
    assert child.stderr == ""


def test_honest_images_are_no_bombs():
    assert np.array_equal(decode(png((9, 7), 8, 2, ROWS + bytes(1 << 20))), PIXELS)  # more data than pixels
    assert np.array_equal(decode(png((9, 7), 8, 2, ROWS, chunk(b"tEXt", b"k\0" + b"x" * (3 << 20)))), PIXELS)
    assert np.array_equal(decode(png((9, 7), 8, 2, ROWS, chunk(b"iCCP", b"k\0\0junk"))), PIXELS)
    plain = decode(encoded(RGB, "JPEG"))
    assert np.array_equal(decode(encoded(RGB, "JPEG", icc_profile=b"x" * (2 << 20))), plain)
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
    made = pack(str(tmp_path / "f"), str(tmp_path / "x.tar"))["train"]
    for name in ("Popen", "run", "call", "check_call", "check_output"):
        monkeypatch.setattr(subprocess, name, refuse)
    monkeypatch.setattr(os, "system", refuse)
    ((_, found),) = by_us(*made)
    assert found[ending] == FOREIGN[kind]
    with pytest.raises(BadImage, match="no JPEG, PNG or WebP"):
        decode(found[ending])


def test_any_of_our_formats_is_read_under_any_of_our_names():
    for kind in ("JPEG", "PNG", "WEBP"):
        assert decode(encoded(RGB, kind)).size == (9, 7)  # decode is not told the name


# ---------------------------------------------------------------------------------------------- rendered images


@pytest.mark.parametrize(
    ("colour", "channels", "shown"), [(0, 1, [0, 0, 0]), (4, 2, [0, 0, 0]), (2, 3, [0, 1, 2]), (6, 4, [0, 1, 2])]
)
def test_16_bits_keep_their_high_byte(colour, channels, shown):
    pixels = DEEP[..., :channels]
    assert np.array_equal(decode(png((4, 3), 16, colour, rows_of(pixels))), pixels[..., shown] >> 8)


@pytest.mark.parametrize(
    ("bits", "byte", "shown"),
    [(1, 0b10100000, [255, 0, 255, 0]), (2, 0b00011011, [0, 85, 170, 255]), (4, 0x0F, [0, 255]), (4, 0x5A, [85, 170])],
)
def test_few_bits_of_grey_go_from_black_to_white(bits, byte, shown):
    found = np.asarray(decode(png((len(shown), 1), bits, 0, bytes([0, byte]))))
    assert found.tolist() == [[[value] * 3 for value in shown]]


def test_palettes_of_any_length_and_alpha_give_their_colours():
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


def test_a_transparent_colour_is_a_colour():
    assert np.array_equal(decode(png((9, 7), 8, 2, ROWS, chunk(b"tRNS", struct.pack(">HHH", *PIXELS[0, 0])))), PIXELS)
    grey = png((4, 1), 8, 0, bytes([0, 1, 2, 3, 4]), chunk(b"tRNS", b"\xff\xff"))
    assert np.asarray(decode(grey))[0, :, 0].tolist() == [1, 2, 3, 4]
    deep = png((4, 3), 16, 0, rows_of(DEEP[..., :1]), chunk(b"tRNS", DEEP[0, 0, 0].tobytes()))
    assert np.array_equal(np.asarray(decode(deep))[..., :1], DEEP[..., :1] >> 8)


@pytest.mark.parametrize(
    "name", ["transparency", "exif", "icc_profile", "dpi", "duration", "default_image", "loop", "xmp"]
)
def test_text_that_calls_itself_like_metadata_is_text(name):
    text = chunk(b"tEXt", name.encode() + b"\0(1, x")
    for size, bits, colour, rows, chunks in (
        ((9, 7), 8, 2, ROWS, []), ((4, 1), 8, 3, bytes(5), [PALETTE]), ((4, 1), 8, 0, bytes(5), []),
        ((2, 1), 8, 4, bytes(5), []), ((4, 3), 16, 0, rows_of(DEEP[..., :1]), []),
    ):  # fmt: skip
        plain = decode(png(size, bits, colour, rows, *chunks))
        assert np.array_equal(decode(png(size, bits, colour, rows, *chunks, text)), plain)


def test_a_lossless_webp_keeps_the_colours_under_its_alpha():
    pixels = np.dstack([PIXELS, PIXELS[..., 0]])
    data = encoded(Image.fromarray(pixels), "WEBP", lossless=True, exact=True)
    assert Image.open(io.BytesIO(data)).mode == "RGBA"
    assert np.array_equal(decode(data), PIXELS)


def test_a_cmyk_jpeg_without_adobes_mark_is_not_inverted():
    with_mark = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)
    at = with_mark.index(b"\xff\xee")
    without = with_mark[:at] + with_mark[at + 2 + struct.unpack(">H", with_mark[at + 2 : at + 4])[0] :]
    inverted = np.asarray(Image.open(io.BytesIO(without)))
    assert np.abs(np.asarray(decode(with_mark)).astype(int) - (255, 0, 0)).max() <= 3
    expected = 255 - inverted[..., :3].astype(int)
    assert np.abs(np.asarray(decode(without)).astype(int) - expected * (255 - inverted[..., 3:]) // 255).max() <= 3


CORNERS = np.kron(np.array([[0, 1, 2], [3, 4, 5]]), np.ones((16, 16), int))  # six fields, each of its own colour
COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [255, 255, 0]], np.uint8)
TURNED = {
    1: [[0, 1, 2], [3, 4, 5]], 2: [[2, 1, 0], [5, 4, 3]], 3: [[5, 4, 3], [2, 1, 0]], 4: [[3, 4, 5], [0, 1, 2]],
    5: [[0, 3], [1, 4], [2, 5]], 6: [[3, 0], [4, 1], [5, 2]], 7: [[5, 2], [4, 1], [3, 0]], 8: [[2, 5], [1, 4], [0, 3]],
}  # fmt: skip


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("number", TURNED)
def test_all_eight_orientations_show_the_same_picture_upright(kind, number):
    settings = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}, "PNG": {}}[kind]
    found = np.asarray(
        decode(encoded(Image.fromarray(COLOURS[CORNERS]), kind, exif=exif(orientation(number)), **settings))
    )
    middles = found[8::16, 8::16].astype(int)
    assert np.abs(middles - COLOURS[np.array(TURNED[number])]).max() <= 8


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
        assert np.array_equal(decode(encoded(RGB, kind, exif=exif(*entries), **settings)), PIXELS), what
    for what, entries in TURNED_ALL_THE_SAME.items():
        turned = np.rot90(PIXELS, -1)
        assert np.array_equal(decode(encoded(RGB, kind, exif=exif(*entries), **settings)), turned), what


def test_the_first_frame_counts_whatever_an_animation_claims():
    last = Image.fromarray(PIXELS[::-1].copy())
    poster = encoded(RGB, "PNG", save_all=True, default_image=True, append_images=[last])
    assert np.array_equal(decode(poster), PIXELS)
    frame = chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 9, 7, 0, 0, 1, 1, 0, 0))
    endless = png((9, 7), 8, 2, ROWS, chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)), frame)
    assert np.array_equal(decode(endless), PIXELS)
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
            bad[at] = chance.choice([0, 1, 127, 255, chance.integers(256)])
        at = 8
        while bad[:4] == b"\x89PNG" and at + 12 <= len(bad):
            stop = at + 8 + int.from_bytes(bad[at : at + 4], "big")
            if stop + 4 > len(bad):
                break
            bad[stop : stop + 4] = struct.pack(">I", zlib.crc32(bytes(bad[at + 4 : stop])))
            at = stop + 4
        if max(int.from_bytes(bad[i : i + 4], "big") for i in (16, 20)) < 5000 or bad[:4] != b"\x89PNG":
            assert outcome(bytes(bad))


# ---------------------------------------------------------------------------------------------- tars by hand


def member(
    name: bytes, data: bytes = picture(0), kind: bytes = b"0", size: bytes | None = None, **fields: bytes
) -> bytes:
    """A header with any fields, and its data. `fields`: prefix, link, at483, …"""
    header = bytearray(512)
    places = {"link": 157, "prefix": 345}
    content = {
        0: name, 100: b"0000644\0", 108: b"0000000\0", 116: b"0000000\0", 136: b"00000000000\0", 156: kind,
        124: b"%011o\0" % len(data) if size is None else size, 257: b"ustar\x0000",
        **{places.get(field) or int(field[2:]): value for field, value in fields.items()},
    }  # fmt: skip
    for at, value in content.items():
        header[at : at + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data + bytes(-len(data) % 512)


def pax(kind: bytes = b"x", **fields: bytes) -> bytes:
    """An extended header; `GNU_sparse_size` stands for `GNU.sparse.size`."""
    body = b""
    for name, value in fields.items():
        record = b" %s=%s\n" % (name.replace("_", ".").encode(), value)
        length = next(n for n in range(len(record) + 1, len(record) + 9) if len(b"%d" % n) + len(record) == n)
        body += b"%d" % length + record
    return member(b"PaxHeaders/x", body, kind)


def binary(number: int) -> bytes:
    """A size as GNU tar writes those that octal digits cannot say."""
    return (number & (1 << 96) - 1 | (0 if number < 0 else 1 << 95)).to_bytes(12, "big")


OK = member(b"a.cls", b"0") + member(b"a.png")
B = member(b"b.png")
LONG = b"././@LongLink"
END = bytes(1024)

REFUSED_TARS = {
    "a long name that climbs": (member(LONG, b"../../b.png\0", b"L") + B, "leads outside"),
    "a prefix that climbs": (member(b"b.png", prefix=b".."), "leads outside"),
    "an absolute prefix": (member(b"b.png", prefix=b"/x"), "leads outside"),
    "an extended path that climbs": (pax(path=b"x/../../b.png") + B, "leads outside"),
    "an absolute extended path": (pax(path=b"/b.png") + B, "leads outside"),
    "a folder that climbs": (member(b"../d/", b"", b"5"), "leads outside"),
    "a NUL in a name": (pax(path=b"b\0c.png") + B, "NUL in its name"),
    "an extended path that is not UTF-8": (pax(path=b"b\xff.png") + B, "UTF-8"),
    "a path that says it is binary": (pax(hdrcharset=b"BINARY", path=b"b\xff.png") + B, "UTF-8"),
    "a long name that is not UTF-8": (member(LONG, b"\xff.png\0", b"L") + B, "UTF-8"),
    "the name of another member": (member(b"c.png") + pax(path=b"c.png") + B, "two members of the same kind"),
    "a block device": (member(b"b.png", b"", b"4"), "link or a device"),
    "a link with a size": (member(b"b.png", b"", b"1", size=binary(10**10), link=b"a.png"), "link or a device"),
    "a type that is none": (member(b"b.png", kind=b"Z"), "link or a device"),
    "old sparse": (member(b"b.png", kind=b"S", at483=b"77777777777\0"), "or sparse"),
    "old sparse that goes on": (member(b"b.png", b"", b"S", at482=b"\1", at483=b"00000000100\0"), "or sparse|as a tar"),
    "sparse 0.0": (pax(GNU_sparse_size=b"99999999999999") + B, "or sparse"),
    "sparse 0.1": (pax(GNU_sparse_map=b"0,1") + B, "or sparse"),
    "sparse 0.1 of no numbers": (pax(GNU_sparse_map=b"0,x") + B, "as a tar"),
    "sparse 1.0": (
        pax(GNU_sparse_major=b"1", GNU_sparse_minor=b"0", GNU_sparse_realsize=b"5")
        + member(b"b.png", b"1\n0\n5\n" + bytes(506) + b"hello"),
        "or sparse",
    ),
    "sparse 1.0 without an end": (
        pax(GNU_sparse_major=b"1", GNU_sparse_minor=b"0") + member(b"b.png", b"99999999\n1\n"),
        "as a tar",
    ),
    "a sparse size alone": (pax(GNU_sparse_realsize=b"4") + B, "or sparse"),
    "a sparse name alone": (pax(GNU_sparse_name=b"c.png") + B, "or sparse"),
    "a huge size": (member(b"b.png", size=binary(10**15)), "truncated inside 'b.png'"),
    "the hugest size": (member(b"b.png", size=b"\x80" + b"\xff" * 11), "truncated inside 'b.png'"),
    "a size in other digits": (member(b"b.png", size=b"zzzzzzzzzzz\0"), "damaged after byte|as a tar"),
    "a huge extended size": (pax(size=b"9" * 30) + B, "truncated inside 'b.png'"),
    "an extended size of many digits": (pax(size=b"9" * 5000) + B, "damaged after byte"),
    "a negative extended size": (pax(size=b"-512") + B, "truncated inside 'b.png'"),
    "an extended size that hides": (pax(size=b"0") + B, "damaged after byte"),
    "an extended record of many digits": (member(b"x", b"9" * 5000 + b" a=b\n", b"x") + B, "as a tar"),
    "an extended record of no length": (member(b"x", b"0 a=b\n", b"x") + B, "damaged after byte|as a tar"),
    "a global path": (pax(b"g", path=b"b.png") + B, "global header"),
    "a global size": (pax(b"g", size=b"0") + B, "global header"),
    "a long name of nothing": (member(LONG, b"b.png\0", b"L"), "as a tar"),
    "an extended header of nothing": (pax(path=b"b.png"), "as a tar"),
    "a chain of long names": (member(LONG, b"b.png\0", b"L") * 1500 + B, "as a tar: maximum recursion"),
    "a chain of extended headers": (pax(path=b"b.png") * 1500 + B, "as a tar: maximum recursion"),
    "a chain of global headers": (pax(b"g", comment=b"x") * 1500 + B, "as a tar: maximum recursion"),
    "a long name too long": (member(LONG, b"x" * (2 << 20), b"L") + B, "as a tar: a header claims 2097152 bytes"),
    "an extended header too long": (pax(comment=b"x" * (2 << 20)) + B, "as a tar: a header claims"),
    **{
        f"{size} bytes for {what}": (member(b"b.png", kind=kind, size=binary(size)), "claims -|link or a device")
        for size in (-512, -256, -(2**40))
        for what, kind in {
            "a file": b"0", "a folder": b"5", "a long name": b"L", "a long link": b"K", "a header": b"x",
            "a global header": b"g", "a volume": b"V", "a sparse file": b"S", "a type that is none": b"Z",
        }.items()
    },
    "WebDataset's key": (member(b"b.__key__", b"x") + B, "key 'b': WebDataset (keeps|writes)"),
    "WebDataset's url": (member(b"b.__url__", b"x") + B, "key 'b': WebDataset (keeps|writes)"),
    "a label of ten digits": (member(b"b.cls", b"9999999999") + B, "key 'b': the label is b'9999999999'"),
    "a label of many digits": (member(b"b.cls", b"1" * 1_000_000) + B, "key 'b': the label is b'1111111111111111111"),
    "a label with a sign": (member(b"b.cls", b"+1") + B, "key 'b': the label"),
    "a label with a line": (member(b"b.cls", b"1_0") + B, "key 'b': the label"),
    "a label with a NUL": (member(b"b.cls", b"1\0") + B, "key 'b': the label"),
    "a label in wide digits": (member(b"b.cls", "１".encode()) + B, "key 'b': the label"),
    "a label in hexadecimal digits": (member(b"b.cls", b"0x1") + B, "key 'b': the label"),
    "two labels": (member(b"b.cls", b"1\n2") + B, "key 'b': the label"),
}  # fmt: skip


def by_ranges(data: bytes) -> list[str]:
    return [as_sample(key, parts, "x.tar").key for key, parts, _, _ in members(io.BytesIO(data), "x.tar")]


@pytest.mark.parametrize("what", REFUSED_TARS)
def test_tars_that_are_refused(tmp_path, what):
    data, message = REFUSED_TARS[what]
    path = tmp_path / "x.tar"
    for before in (OK, b""):  # in the middle of a tar, and as its first header
        path.write_bytes(before + data + END)
        with pytest.raises(UserError, match=message) as error:
            build_index(str(path))
        assert str(path) in str(error.value)
        assert len(str(error.value)) < 1000
        with pytest.raises(UserError, match=message):
            pack(str(path), str(tmp_path / "out" / "y.tar"))
        assert not [*(tmp_path / "out").glob("*"), *(tmp_path / "out").glob(".*")]
        if "damaged after" not in message:  # what is no header at all ends a range: the index knows how many must come
            with pytest.raises(UserError, match=message):
                by_ranges(before + data + END)
        for cut in range(512, len(data), max(512, len(data) // 4096 * 512)):  # without the rest
            path.write_bytes(before + data[:cut])
            with pytest.raises(UserError):
                build_index(str(path))


READ_TARS = {
    "an extended path": (pax(path="ü/long.png".encode()) + B, "ü/long"),
    "an extended size": (pax(size=b"%d" % len(picture(0))) + member(b"b.png", size=b"00000000000\0"), "b"),
    "extended times and owners that are none": (pax(mtime=b"inf", uid=b"x", comment=b"-") + B, "b"),
    "an extended link's target of a file": (pax(linkpath=b"../x") + B, "b"),
    "a global comment": (pax(b"g", comment=b"0123abc") + B, "b"),
    "a long name": (member(LONG, b"c/d.png\0", b"L") + B, "c/d"),
    "a contiguous file": (member(b"b.png", kind=b"7"), "b"),
    "a folder that claims a size": (member(b"d/", b"", b"5", size=binary(10**9)) + B, "b"),
    "a line break in a name": (member(b"b\nc.png"), "b\nc"),
    "signs for terminals in a name": (member(b"b\x1b[31m.png"), "b\x1b[31m"),
    "dots and slashes": (member(b"./x//b.png"), "./x//b"),
    "JSON that is none": (member(b"b.json", b"{") + B, "b"),
    "JSON that is not UTF-8": (member(b"b.json", b"\xff\xfe{") + B, "b"),
    "JSON that is empty": (member(b"b.json", b"") + B, "b"),
    "JSON that is deep": (member(b"b.json", b"[" * 100_000) + B, "b"),
    "JSON that is no number": (member(b"b.json", b"NaN") + B, "b"),
}


@pytest.mark.parametrize("what", READ_TARS)
def test_tars_that_are_odd_are_read_and_packed_as_webdataset_reads_them(tmp_path, what):
    data, key = READ_TARS[what]
    path = tmp_path / "x.tar"
    path.write_bytes(OK + data + member(b"z.png", picture(1)) + END)
    index = build_index(str(path))
    assert index.keys == ("a", key, "z")
    assert by_us(str(path)) == by_webdataset(str(path))
    assert [read_samples(str(path), index, range(i, i + 1))[0].key for i in range(3)] == list(index.keys)
    (made,) = pack(str(path), str(tmp_path / "out" / "y.tar"), shuffle=False)["train"]
    assert by_us(made) == by_webdataset(made) == by_us(str(path))


@pytest.mark.parametrize("name", [b"b.", b"b._x", b"b._"])
def test_members_that_webdataset_cannot_write_are_read_and_not_packed(tmp_path, name):
    path = tmp_path / "x.tar"
    path.write_bytes(OK + member(name, b"x") + B + END)
    assert build_index(str(path)).keys == ("a", "b")
    with pytest.raises(UserError, match=r"x\.tar: key 'b': WebDataset writes no member called"):
        pack(str(path), str(tmp_path / "out" / "y.tar"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "size"), [(b"0", LARGEST + 1), (b"0", 50 << 30), (b"L", 50 << 30), (b"x", 50 << 30)])
def test_a_member_as_long_as_its_file_takes_no_memory(tmp_path, kind, size):
    path = tmp_path / "x.tar"
    path.write_bytes(member(b"b.png", b"", kind, size=binary(size)))
    os.truncate(path, 512 + size // 512 * 512 + 2048)  # holes: it takes no room on the disk
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for look in (build_index, lambda url: pack(url, str(tmp_path / "out" / "y.tar"))):
        with pytest.raises(UserError, match="bytes"):
            look(str(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << (10 if sys.platform != "darwin" else 20)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_damaged_long_headers_end_in_a_clear_error_or_in_samples(tmp_path, form):
    names = [f"{'long/' * 40}ü{i}" for i in range(3)]
    path = Path(write_tar(tmp_path / "x.tar", [(f"{name}.png", picture(0)) for name in names], format=form))
    data, chance = path.read_bytes(), np.random.default_rng(0)
    heads = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    for _ in range(300):
        bad = bytearray(data)
        at = int(chance.choice(heads))
        bad[at + int(chance.choice([124, 134, 156, 482, 483, chance.integers(512)]))] = chance.choice(
            [0x80, 255, *b"0LKSxgX"]
        )
        bad[at + 512 + int(chance.integers(40))] = chance.choice([0, 255, *b" =\n0129"])  # in names and records
        bad[at + 148 : at + 156] = b" " * 8
        bad[at + 148 : at + 156] = b"%06o\0 " % sum(bad[at : at + 512])
        path.write_bytes(bad)
        for look in (lambda: build_index(str(path)), lambda: by_ranges(bytes(bad))):  # noqa: B023
            try:
                look()
            except UserError as error:
                assert "x.tar" in str(error)  # noqa: PT017


# ---------------------------------------------------------------------------------------------- compressed, named


def test_a_compressed_tar_with_changed_bytes_is_refused(tmp_path):
    whole = Path(write_tar(tmp_path / "whole.tar", samples(40))).read_bytes()
    path = tmp_path / "x.tar.gz"
    for at in range(20, 2000, 90):
        data = bytearray(gzip.compress(whole))
        data[at] ^= 0xFF
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"x\.tar\.gz: "):
            pack(str(path), str(tmp_path / "out" / "y.tar"))
    assert not (tmp_path / "out").exists()


def test_a_compressed_tar_that_would_fill_the_disk_is_refused(tmp_path):
    (tmp_path / "x.tar.bz2").write_bytes(bz2.compress(bytes(100 << 20)))
    with pytest.raises(UserError, match=r"x\.tar\.bz2: more than [0-9,]+ bytes once decompressed"):
        pack(str(tmp_path / "x.tar.bz2"), str(tmp_path / "y.tar"))


def test_names_of_classes_that_are_not_utf8_are_refused_before_anything_is_written(tmp_path):
    try:
        (tmp_path / "f" / os.fsdecode(b"caf\xe9")).mkdir(parents=True)
    except OSError:
        pytest.skip("this file system keeps names as UTF-8")
    (tmp_path / "f" / os.fsdecode(b"caf\xe9/\xff.png")).write_bytes(picture(0))
    with pytest.raises(UserError, match=r"class 'caf\\udce9': its name is not UTF-8"):
        pack(str(tmp_path / "f"), str(tmp_path / "out" / "y.tar"))
    (tmp_path / "f" / os.fsdecode(b"caf\xe9")).rename(tmp_path / "f" / "cafe")
    made = pack(str(tmp_path / "f"), str(tmp_path / "out" / "y.tar"))
    assert by_us(*made["train"]) == by_webdataset(*made["train"]) == [("cafe__", {"png": picture(0), "cls": b"0"})]


CLASS_LISTS = {
    "deep": b"[" * 1_000_000,
    "deep and closed": b'["a",' + b"[" * 200_000 + b"]" * 200_001,
    "deep objects": b'{"a":' * 200_000,
    "not a number": b"[NaN]",
    "infinite": b"[1e999]",
    "a long number": b"[" + b"9" * 100_000 + b"]",
    "latin-1": '["caf\xe9"]'.encode("latin-1"),
    "half of a sign": b'["\\ud800"]',
    "a name among numbers": b'["a", 1]',
    "an object that looks like a list": b'{"0": "a"}',
}  # fmt: skip


@pytest.mark.parametrize("what", CLASS_LISTS)
def test_hostile_class_lists_are_refused(tmp_path, what):
    (tmp_path / "classes.json").write_bytes(CLASS_LISTS[what])
    path = write_tar(tmp_path / "x.tar", samples(2))
    with pytest.raises(UserError, match=r"classes\.json|not UTF-8") as error:
        pack(path, str(tmp_path / "out" / "y.tar"))
    assert len(str(error.value)) < 1000
    assert not (tmp_path / "out").exists()


def test_a_long_class_list_is_a_class_list(tmp_path):
    names = [f"class {i} ü" for i in range(100_000)]
    (tmp_path / "classes.json").write_text(json.dumps(names))
    path = write_tar(tmp_path / "x.tar", samples(2))
    assert pack(path, str(tmp_path / "out" / "y.tar"))["classes"] == names
    assert classes_of([str(tmp_path / "out" / "y.tar")]) == names


def test_an_image_that_is_bad_is_packed_and_refused_when_it_is_rendered(tmp_path):
    (tmp_path / "f" / "a").mkdir(parents=True)
    for name, data in {"empty": b"", "bomb": BOMBS["zTXt before"][0], "zero": REFUSED_IMAGES["no width"][0]}.items():
        (tmp_path / "f" / "a" / f"{name}.png").write_bytes(data)
    made = pack(str(tmp_path / "f"), str(tmp_path / "x.tar"))["train"]
    assert by_us(*made) == by_webdataset(*made)
    for _, found in by_us(*made):
        with pytest.raises(BadImage):
            render(found["png"], View((0, 0, 4, 4)), 4)
