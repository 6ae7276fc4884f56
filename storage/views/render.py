"""Rendering: from an image's bytes and a view to uint8 pixels, bit for bit on every machine."""

from __future__ import annotations

import contextlib
import functools
import io
import warnings
from typing import TYPE_CHECKING

import google_crc32c
import numpy as np
import PIL
from PIL import Image, ImageOps, features

from storage.errors import UserError, first_line
from storage.views.image_metadata import without_metadata
from storage.views.randaugment import OPERATIONS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from storage.views.view import View

# More pixels than any photograph has; fewer than make a machine swap. Pillow's own limit only warns at half of it.
MAX_PIXELS = 178_956_970

_TURNING = {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}  # where Pillow looks for an orientation
FORMATS = ("JPEG", "PNG", "WEBP")


class BadImage(UserError):
    """Bytes that cannot be rendered; the message says why."""


@contextlib.contextmanager
def _bad_images() -> Iterator[None]:
    """Whatever a decoder raises on hostile bytes, as BadImage."""
    # Pillow warns from half of MAX_PIXELS on; what is refused is decided here.
    if ("ignore", None, Image.DecompressionBombWarning, None, 0) not in warnings.filters:
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    try:
        yield
    except (BadImage, MemoryError):
        raise
    except PIL.UnidentifiedImageError:
        raise BadImage("cannot be decoded: it is not a JPEG, PNG or WebP file, or its beginning is damaged") from None
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, …
        raise BadImage(f"cannot be decoded: {first_line(error)}") from None


def _opened(file: io.BytesIO | Path) -> Image.Image:
    """An image of which only the header is read. Raises BadImage, beside what Pillow raises."""
    image = Image.open(file, formats=FORMATS)
    if image.width * image.height > MAX_PIXELS or max(image.size) > 1_000_000:  # resizing takes memory by this side
        most = f"{MAX_PIXELS:,}, or 1,000,000 on a side,"
        raise BadImage(f"{image.width}x{image.height} pixels, more than {most} are refused")
    return image


def size_in(path: Path) -> tuple[int, int]:
    """Width and height by an image file's header, before it is turned upright.

    Raises:
        BadImage: no JPEG, PNG or WebP, or one that `decode` refuses for its size.
    """
    with _bad_images():
        with contextlib.suppress(PIL.UnidentifiedImageError, ValueError), _opened(path) as image:
            return image.size
        # its metadata may be why: only such files are read whole
        return _opened(io.BytesIO(without_metadata(path.read_bytes()))).size


def decode(data: bytes) -> Image.Image:
    """The RGB image in a sample's bytes, turned upright by its EXIF orientation.

    The first frame of an animation; alpha is dropped; 16-bit gray is scaled to 8 bits. Other metadata is skipped.

    Raises:
        BadImage: not a whole JPEG, PNG or WebP, more pixels than MAX_PIXELS, or a JPEG that would take minutes.
    """
    with _bad_images():
        image = _opened(io.BytesIO(without_metadata(data)))
        # A scan is ten bytes of a JPEG at least, and goes over all of its pixels: 5e10 take some 20 seconds.
        scans = data.count(b"\xff\xda") if image.format in ("JPEG", "MPO") else 1
        if scans * image.width * image.height > 5e10:
            raise BadImage(f"{image.width}x{image.height} pixels in {scans:,} scans are refused")
        image.load()
    upright = image
    if not _TURNING.isdisjoint(image.info):  # without these Pillow only copies
        with contextlib.suppress(Exception):  # the pixels are whole: metadata that cannot be read turns nothing
            upright = ImageOps.exif_transpose(image)
    upright.info.pop("transparency", None)  # a text chunk can call itself so, and then `convert` fails
    if upright.mode.startswith("I"):  # Pillow would clip 16-bit gray to white
        gray = np.asarray(upright).astype(np.uint32) >> 8
        upright = Image.fromarray(gray.clip(0, 255).astype(np.uint8))
    return upright if upright.mode == "RGB" else upright.convert("RGB")


def render(image: bytes | Image.Image, view: View, size: int) -> np.ndarray:
    """The view image, uint8 [S, S, 3], before mixing.

    Args:
        image: a sample's bytes, or what `decode` made of them when several views of it are rendered.
        view: the parameters.
        size: S, the bank's view size.
    """
    decoded = decode(image) if isinstance(image, bytes) else image
    box = view.box
    bounds = (max(0.0, box[0]), max(0.0, box[1]), min(decoded.width, box[2]), min(decoded.height, box[3]))
    frame = decoded.resize((size, size), Image.Resampling.BICUBIC, box=bounds)
    if view.shift != (0, 0):
        moved = Image.new("RGB", (size, size))
        moved.paste(frame, view.shift)
        frame = moved
    if view.flip:
        frame = frame.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for number, argument in view.operations:
        frame = OPERATIONS[number][1](frame, argument)
    pixels = np.frombuffer(bytearray(frame.tobytes()), np.uint8).reshape(size, size, 3)
    left, top, right, bottom = view.erased
    if right > left:
        noise = np.random.Generator(np.random.Philox(key=view.erase_seed)).bytes((right - left) * (bottom - top) * 3)
        pixels[top:bottom, left:right] = np.frombuffer(noise, np.uint8).reshape(bottom - top, right - left, 3)
    return pixels


def signature(pixels: np.ndarray) -> int:
    """The crc32c of a rendered image's bytes, kept in the bank and compared whenever it is rendered again."""
    return int(google_crc32c.value(np.ascontiguousarray(pixels)))


@functools.lru_cache(maxsize=1)
def renderer() -> dict[str, str]:
    """What rendered: versions of Pillow and of its decoders."""
    libraries = {"libjpeg": "jpg", "zlib": "zlib", "webp": "webp"}
    versions = {name: str(features.version(feature)) for name, feature in libraries.items()}
    turbo = features.check_feature("libjpeg_turbo") and features.version_feature("libjpeg_turbo")
    return {"pillow": PIL.__version__, **versions, "libjpeg_turbo": str(turbo)}
