"""Metadata makes no pixel bad, is skipped and not inflated, and turns an image as Pillow turns it."""

from __future__ import annotations

import contextlib
import io
import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from storage.views.image_metadata import without_metadata
from storage.views.render import decode, size_in
from tests.storage.helpers import encoded, same
from tests.storage.views.handmade import PALETTE, PIXELS, RGB, ROWS, chunk, exif, orientation, png, text_bombs

pytestmark = pytest.mark.usefixtures("never_hangs")
TURNED = np.rot90(PIXELS, -1)
XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
PROFILE = "\nexif\n      26\n" + exif(orientation(6)).hex()  # as ImageMagick writes it
TWO_MIB = zlib.compress(bytes(2 << 20), 9)
TOO_LARGE = {
    "an ICC profile": chunk(b"iCCP", b"icc\0\0" + TWO_MIB),
    "compressed text": chunk(b"zTXt", b"Comment\0\0" + TWO_MIB),
    "international text": chunk(b"iTXt", b"Comment\0\1\0\0\0" + TWO_MIB),
    "XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + TWO_MIB),
    "EXIF in compressed text": chunk(b"zTXt", b"Raw profile type exif\0\0" + TWO_MIB),
    "much text": b"".join(chunk(b"tEXt", b"k%d\0" % i + bytes(1 << 20)) for i in range(70)),
    "much XMP": b"".join(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + b" " * (1 << 20)) for _ in range(70)),
}
DAMAGED = {
    "a profile of another compression": chunk(b"iCCP", b"icc\0\7x"),
    "text of another compression": chunk(b"zTXt", b"k\0\7x"),
    "gamma of one byte": chunk(b"gAMA", b"\1"),
    "chromaticities of one byte": chunk(b"cHRM", b"\1"),
    "a resolution of one byte": chunk(b"pHYs", b"\1"),
    "a checksum of another text": chunk(b"tEXt", b"k\0v")[:-1] + b"!",
    "a checksum of another EXIF": chunk(b"eXIf", exif(orientation(6))[6:])[:-1] + b"!",
    "text for a frame's box": chunk(b"tEXt", b"bbox\0x"),
    "text that says interlaced": chunk(b"tEXt", b"interlace\x001"),
}


@pytest.mark.parametrize("what", [*TOO_LARGE, *DAMAGED])
def test_a_png_with_metadata_that_pillow_refuses_has_the_pixels_that_it_has_without(tmp_path, what) -> None:
    data = {**TOO_LARGE, **DAMAGED}[what]
    assert same(decode(png((9, 7), 8, 2, ROWS, data)), PIXELS)
    if "EXIF" not in what:  # what follows the pixels turns them, whatever its checksum is
        assert same(decode(png((9, 7), 8, 2, ROWS, after=data)), PIXELS)
    assert same(decode(png((9, 7), 8, 2, ROWS, data, chunk(b"eXIf", exif(orientation(6))[6:]))), TURNED)
    plain = decode(png((4, 1), 8, 3, bytes([0, 0, 1, 0, 1]), PALETTE))
    assert same(decode(png((4, 1), 8, 3, bytes([0, 0, 1, 0, 1]), data, PALETTE)), plain)
    (tmp_path / "x.png").write_bytes(png((9, 7), 8, 2, ROWS, data))
    assert size_in(tmp_path / "x.png") == (9, 7)


def test_bombs_are_not_inflated() -> None:
    for what, data in text_bombs().items():
        tracemalloc.start()
        pixels = decode(data)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert same(pixels, PIXELS), what
        assert peak < (2 << 20) + 3 * len(data), what


def png_with(key: str, text: str, *, international: bool = False, compressed: bool = False) -> bytes:
    info = PngInfo()
    (info.add_itxt if international else info.add_text)(key, text, zip=compressed)
    return encoded(RGB, "PNG", pnginfo=info)


def turning() -> dict[str, bytes]:
    """Images that Pillow reads, with metadata of every kind."""
    found = {
        "no metadata": encoded(RGB, "PNG"),
        "XMP": png_with("XML:com.adobe.xmp", XMP, international=True),
        "compressed XMP": png_with("XML:com.adobe.xmp", XMP, international=True, compressed=True),
        "XMP as text": png_with("XML:com.adobe.xmp", XMP),
        "a profile": png_with("Raw profile type exif", PROFILE),
        "a compressed profile": png_with("Raw profile type exif", PROFILE, compressed=True),
        "a profile that is none": png_with("Raw profile type exif", "\nexif\n 9\nzz"),
        "a comment": png_with("Comment", XMP),
        "EXIF after the pixels": png((9, 7), 8, 2, ROWS, after=chunk(b"eXIf", exif(orientation(6))[6:])),
        "EXIF and XMP": png(
            (9, 7),
            8,
            2,
            ROWS,
            chunk(b"eXIf", exif(orientation(3))[6:]),
            chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP.encode()),
        ),
    }
    for kind in ("JPEG", "WEBP", "MPO"):
        settings: dict[str, dict[str, Any]] = {
            "JPEG": {},
            "WEBP": {"lossless": True},
            "MPO": {"save_all": True, "append_images": [RGB]},
        }
        own = settings[kind]
        found[f"{kind}: EXIF"] = encoded(RGB, kind, exif=exif(orientation(6)), **own)
        found[f"{kind}: a profile"] = encoded(RGB, kind, icc_profile=b"x" * 200_000, exif=exif(orientation(8)), **own)
    found["JPEG: XMP"] = encoded(RGB, "JPEG", xmp=XMP.encode(), comment=b"c" * 60_000)
    found["JPEG: CMYK"] = encoded(RGB.convert("CMYK"), "JPEG", exif=exif(orientation(6)), icc_profile=b"x" * 70_000)
    found["JPEG: progressive"] = encoded(RGB, "JPEG", progressive=True, comment=b"c", exif=exif(orientation(5)))
    return found


@pytest.mark.parametrize("what", turning())
def test_what_pillow_reads_is_turned_as_pillow_turns_it(what) -> None:
    data = turning()[what]
    image: Image.Image = Image.open(io.BytesIO(data))
    image.load()
    with contextlib.suppress(ValueError):  # a profile that is none
        image = ImageOps.exif_transpose(image)
    assert same(decode(data), image.convert("RGB"))


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


SEGMENTS = {
    "a profile without a number": segment(0xE2, b"ICC_PROFILE\0"),
    "a profile of which most is missing": segment(0xE2, b"ICC_PROFILE\0\1\xffx"),
    "Photoshop's block cut short": segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\xff"),
    "JFIF cut short": segment(0xE0, b"JFIF\0\1"),
    "Adobe's mark cut short": segment(0xEE, b"Adobe\0"),
    "pictures that are not there": segment(0xE2, b"MPF\0II*\0\x08\0\0\0\xff\xff"),
    "any bytes": segment(0xEF, bytes(range(256))) + segment(0xE9, b"") + segment(0xFE, b"\xff\xd8\xff\xda"),
}


@pytest.mark.parametrize("what", SEGMENTS)
@pytest.mark.parametrize("settings", [{}, {"progressive": True}, {"exif": exif(orientation(6))}], ids=str)
def test_a_jpeg_with_damaged_metadata_has_the_pixels_that_it_has_without(what, settings) -> None:
    plain = encoded(RGB, "JPEG", **settings)
    for at in (2, plain.index(b"\xff\xdb")):  # before all, and after JFIF
        assert same(decode(plain[:at] + SEGMENTS[what] + plain[at:]), decode(plain))


@pytest.mark.parametrize("name", [b"ICCP", b"EXIF", b"XMP "])
def test_a_webp_with_any_metadata_has_the_pixels_that_it_has_without(name) -> None:
    pixels = encoded(RGB, "WEBP", lossless=True)[12:]
    chance = np.random.default_rng(0)
    flag = {b"ICCP": 0x20, b"EXIF": 8, b"XMP ": 4}[name]
    for length in (0, 2, 6, 40, 100_000, 2 << 20):
        about = name + struct.pack("<I", length) + chance.bytes(length)
        parts = [about, pixels] if name == b"ICCP" else [pixels, about]
        canvas = b"VP8X" + struct.pack("<IB3x", 10, flag) + b"\x08\0\0\x06\0\0"
        content = b"WEBP" + canvas + b"".join(parts)
        assert same(decode(b"RIFF" + struct.pack("<I", len(content)) + content), PIXELS), length


def test_real_images_keep_their_pixels(shared) -> None:
    from storage.shards.index import cached_index, read_samples

    url = str(shared / "data" / "photos-000000.tar")
    for sample in read_samples(url, index := cached_index(url), range(min(64, len(index)))):
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(sample.image)))
        assert same(decode(sample.image), image.convert("RGB")), sample.key


def test_files_without_metadata_are_not_copied() -> None:
    images = [encoded(RGB, kind) for kind in ("PNG", "JPEG", "WEBP")]
    for data in (*images, b"", b"\xff\xd8", b"\x89PNG\r\n\x1a\n"):
        assert without_metadata(data) is data


def test_files_cut_anywhere_end() -> None:
    for data in turning().values():
        for stop in range(0, len(data), max(1, len(data) // 200)):
            assert len(without_metadata(data[:stop])) <= stop
