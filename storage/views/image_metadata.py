"""Images without metadata that says nothing about their pixels: it is skipped, so that none makes an image bad.

Pillow reads metadata before pixels, inflates what is compressed, and refuses an image whose metadata is too large or
damaged. What turns an image upright (EXIF, and XMP where there is none) stays, and so does all that decoding needs.
"""

from __future__ import annotations

import struct
import zlib

_PNG = b"\x89PNG\r\n\x1a\n"
_PIXELS = {b"tRNS", b"acTL", b"fcTL", b"fdAT"}  # chunks of pixels, whose names say that decoders can do without
_TURNING = {b"exif", b"Raw profile type exif", b"XML:com.adobe.xmp", b"xmp"}  # where Pillow finds an orientation
_MOST_TEXT = 1 << 20  # bytes of one inflated text, and Pillow's limit, too
_MOST_TEXTS = 32 << 20  # of all texts that stay


def without_metadata(data: bytes) -> bytes:
    """The bytes of an image file without metadata; the same bytes where there is none, or for another format."""
    if data.startswith(_PNG):
        return _png(data)
    return _jpeg(data) if data.startswith(b"\xff\xd8") else data


def _png(data: bytes) -> bytes:
    pieces: list[bytes] = []
    begin, at, texts, image = 0, len(_PNG), 0, False
    while at + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        stop = at + 12 + length
        if stop > len(data) or not name.isalpha():
            break
        image = image or name == b"IDAT"
        if name[:1].islower() and name not in _PIXELS:
            content = data[at + 8 : stop - 4]
            intact = image or zlib.crc32(name + content).to_bytes(4, "big") == data[stop - 4 : stop]
            size = 0 if name == b"eXIf" else _turning_text(name, content)
            if not intact or size is None or texts + size > _MOST_TEXTS:
                pieces.append(data[begin:at])
                begin = stop
            else:
                texts += size
        at = stop
    return b"".join([*pieces, data[begin:]]) if pieces else data


def _turning_text(name: bytes, content: bytes) -> int | None:
    """How many bytes a chunk's text may take; None where it is no text that turns, or one that Pillow would refuse."""
    key, _, text = content.partition(b"\0")
    if name not in (b"tEXt", b"zTXt", b"iTXt") or key not in _TURNING:
        return None
    if name == b"zTXt":
        return _inflated(text[1:]) if text[:1] in (b"", b"\0") else None
    if name == b"iTXt" and text[:1] not in (b"", b"\0"):
        return _inflated(text[2:].split(b"\0", 2)[-1])
    return len(text)


def _inflated(text: bytes) -> int | None:
    """The length of a text once it is inflated; None above the limit, where it is not inflated further."""
    inflater = zlib.decompressobj()
    try:
        size = len(inflater.decompress(text, _MOST_TEXT))
    except zlib.error:  # Pillow takes it for an empty one
        return 0
    return None if inflater.unconsumed_tail else size


def _jpeg(data: bytes) -> bytes:
    """The segments before the first scan but for APP2 to APP13, APP15 and comments, and APP0 and APP14 cut short."""
    pieces: list[bytes] = []
    begin, at = 0, 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        stop = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker < 0xC0 or 0xD0 <= marker <= 0xDA or stop > len(data) or stop < at + 4:
            break  # a scan, the end, or what is no segment
        # libjpeg reads neither of the two where it is shorter
        short = (marker == 0xE0 and data[at + 4 : at + 8] == b"JFIF" and stop - at - 4 < 14) or (
            marker == 0xEE and data[at + 4 : at + 9] == b"Adobe" and stop - at - 4 < 12
        )
        if short or 0xE2 <= marker <= 0xED or marker in (0xEF, 0xFE):
            pieces.append(data[begin:at])
            begin = stop
        at = stop
    return b"".join([*pieces, data[begin:]]) if pieces else data
