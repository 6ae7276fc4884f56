"""Images made by hand, as no library writes them: any header, any metadata, and bombs."""

from __future__ import annotations

import struct
import zlib

import numpy as np
from PIL import Image

from storage.views.draw import draw_view
from storage.views.policy import policy
from storage.views.render import MAX_PIXELS, BadImage, decode, render
from tests.storage.helpers import encoded


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(size: tuple[int, int], bits: int, color: int, rows: bytes, *chunks: bytes, after: bytes = b"") -> bytes:
    """A PNG with any header; `rows` begin with their filter's number. Pillow writes only some of these."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, color, 0, 0, 0))
    return b"".join(
        [b"\x89PNG\r\n\x1a\n", header, *chunks, chunk(b"IDAT", zlib.compress(rows)), after, chunk(b"IEND", b"")]
    )


def rows_of(pixels: np.ndarray) -> bytes:
    return b"".join(b"\0" + row.tobytes() for row in pixels)


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
    **{name: (data, "rendered") for name, data in text_bombs().items()},
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
        render(image, draw_view(policy("eval", 16), "a", 0, image.size), 16)
    except BadImage as error:
        return str(error)
    return "rendered"
