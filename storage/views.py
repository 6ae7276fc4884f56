"""Views: the explicit parameters that turn a sample's bytes into one uint8 image, and the one function that does it.

`draw` finds parameters, `render` obeys them; the store keeps the parameters and a signature of the pixels. Both sides,
the teacher's and the student's, call `render`, made only of Pillow's uint8 operations, which are bit-exact everywhere.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Context, Decimal
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import PIL
from PIL import Image, ImageOps, features

from storage import records
from storage.errors import UserError, first_line
from storage.metadata import without_metadata
from storage.operations import OPERATIONS, draw_operations
from storage.policies import Policy

# More pixels than any photograph has; fewer than make a machine swap. Pillow's own limit only warns at half of it.
MAX_PIXELS = 178_956_970
FORMATS = ("JPEG", "PNG", "WEBP")

# The columns of a bank.
COLUMNS = (
    "valid",
    "left", "top", "right", "bottom",  # crop box in the source image's pixels, resized to S×S (bicubic)
    "shift_x", "shift_y",  # the S×S frame is moved by whole pixels; what comes in is black
    "flip",
    "op1", "magnitude1", "op2", "magnitude2", "op3", "magnitude3", "op4", "magnitude4",
    "erase_left", "erase_top", "erase_right", "erase_bottom", "erase_seed",
    "mix", "partner", "amount", "mix_left", "mix_top", "mix_right", "mix_bottom",
)  # fmt: skip

_DECIMAL = Context(prec=28)


class BadImage(UserError):
    """Bytes that cannot be rendered; the message says why."""


MIXUP, CUTMIX = 1, 2


@dataclass(frozen=True)
class Mix:
    """How a view image is mixed with its partner's, after both were rendered.

    Attributes:
        kind: MIXUP (the whole image is blended) or CUTMIX (the box comes from the partner).
        partner: the partner's index in the shard.
        amount: the partner's share of the image, and of the label, in 1/256.
        box: left, top, right, bottom; of CUTMIX.
    """

    kind: int
    partner: int
    amount: int
    box: tuple[int, int, int, int] = (0, 0, 0, 0)


@dataclass(frozen=True)
class View:
    """The parameters of one view image. Boxes are (left, top, right, bottom)."""

    box: tuple[float, float, float, float]
    shift: tuple[int, int] = (0, 0)
    flip: bool = False
    valid: bool = True
    operations: tuple[tuple[int, float], ...] = ()  # numbers of storage.operations, with their arguments
    erased: tuple[int, int, int, int] = (0, 0, 0, 0)
    erase_seed: int = 0
    mix: Mix | None = None

    def row(self) -> np.ndarray:
        """The view as one row of a bank, f64 [columns]."""
        row = np.zeros(len(COLUMNS), np.float64)
        row[0] = self.valid
        row[1:5] = self.box
        row[5:7] = self.shift
        row[7] = self.flip
        for i, (number, argument) in enumerate(self.operations):
            row[8 + 2 * i : 10 + 2 * i] = number, argument
        row[16:20], row[20] = self.erased, self.erase_seed
        row[22] = -1
        if self.mix:
            row[21:28] = self.mix.kind, self.mix.partner, self.mix.amount, *self.mix.box
        return row

    @classmethod
    def of(cls, row: np.ndarray) -> View:
        """The view that a row of a bank says."""
        left, top, right, bottom = (float(x) for x in row[1:5])
        whole = [int(x) for x in row]
        operations = tuple((whole[i], float(row[i + 1])) for i in range(8, 16, 2) if whole[i])
        kind, partner, amount, *mixed = whole[21:28]
        mix = Mix(kind, partner, amount, (mixed[0], mixed[1], mixed[2], mixed[3])) if kind else None
        erased = (whole[16], whole[17], whole[18], whole[19])
        return cls(
            (left, top, right, bottom), (whole[5], whole[6]), bool(row[7]), bool(row[0]), operations, erased,
            whole[20], mix,
        )  # fmt: skip


INVALID = View((0, 0, 0, 0), valid=False)


def generator(*arguments: object) -> np.random.Generator:
    """NumPy's Philox keyed by a digest of the arguments: what is drawn depends on nothing else."""
    key = hashlib.sha256(records.canonical(list(arguments))).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def draw(policy: Policy, key: str, view: int, image_size: tuple[int, int], i: int = 0, block: range = range(1)) -> View:
    """The view of a sample with this number under a policy.

    Chance comes from (line, seed, key, view) alone; the size (width, height) of the image turns it into pixels, and the
    sample's index `i` and its block, both in the shard, turn it into a partner for mixing. Where the partner turns out
    to be invalid, `settle` takes the mixing away.
    """
    chance = generator("view", policy.line, policy.seed, key, view)
    width, height = image_size
    side = policy.size
    made: dict[str, Any] = {"box": (0.0, 0.0, float(width), float(height))}
    for name, arguments in policy.operations:
        if name == "short":  # the short side becomes round(S/f); `center` then keeps the middle S×S of it
            short = min(width, height) * side / round(side / arguments[0])
            made["box"] = _middle(width, height, short)
        elif name == "crop":
            border = round(arguments[0] * side)
            made["box"] = _middle(width, height, min(width, height))
            x, y = (int(n) for n in chance.integers(-border, border, size=2, endpoint=True))
            made["shift"] = (x, y)
        elif name == "rrc":
            made["box"] = _resized_crop(chance, width, height, arguments)
        elif name == "flip":
            made["flip"] = bool(chance.integers(2))
        elif name == "randaug":
            made["operations"] = draw_operations(chance, *arguments)
        elif name == "erase" and chance.random() < arguments[0]:
            made["erased"] = _erased_box(chance, side)
            made["erase_seed"] = int(chance.integers(2**32))
        elif name == "mix":
            made["mix"] = _mix(chance, side, arguments, i, block)
    return View(**made)


def settle(views: Sequence[View], block: range) -> list[View]:
    """The views of a whole block, without the mixing of those whose partner is invalid."""
    return [
        replace(view, mix=None) if view.mix and not views[view.mix.partner - block.start].valid else view
        for view in views
    ]


TRIES = 10  # boxes that are drawn before the middle is taken (crop), or nothing (erase)


def _resized_crop(
    chance: np.random.Generator, width: int, height: int, scale: Sequence[float]
) -> tuple[float, float, float, float]:
    """Inception's crop: a part of the area in `scale`, an aspect ratio from 3/4 to 4/3, log-uniform."""
    for _ in range(TRIES):
        area = width * height * chance.uniform(scale[0], scale[1])
        ratio = _log_uniform(chance, 3 / 4)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = chance.integers(width - w, endpoint=True), chance.integers(height - h, endpoint=True)
            return (float(left), float(top), float(left + w), float(top + h))
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    x, y = float((width - w) // 2), float((height - h) // 2)
    return (x, y, x + w, y + h)


def _erased_box(chance: np.random.Generator, side: int) -> tuple[int, int, int, int]:
    """Random erasing (Zhong et al. 2020) with timm's ranges: 2 % to a third of the area, aspect ratio 0.3 to 1/0.3."""
    for _ in range(TRIES):
        area = side * side * chance.uniform(0.02, 1 / 3)
        ratio = _log_uniform(chance, 0.3)
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w < side and 0 < h < side:
            top, left = int(chance.integers(side - h, endpoint=True)), int(chance.integers(side - w, endpoint=True))
            return (left, top, left + w, top + h)
    return (0, 0, 0, 0)


def _log_uniform(chance: np.random.Generator, low: float) -> float:
    """From `low` to 1/low. Decimal's exponential is rounded correctly on every machine, the C library's is not."""
    exponent = Decimal(chance.uniform(-1.0, 1.0)) * Decimal(low).ln(_DECIMAL)
    return float(exponent.exp(_DECIMAL))


def _mix(chance: np.random.Generator, side: int, alphas: Sequence[float], i: int, block: range) -> Mix | None:
    """Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019), each with ½ where both alphas are above 0."""
    u, which = chance.random(), chance.random()
    mixup, cutmix = alphas
    kind = MIXUP if mixup and (not cutmix or which < 0.5) else CUTMIX
    alpha = mixup if kind == MIXUP else cutmix
    share = float(chance.beta(alpha, alpha))
    box = (0, 0, 0, 0)
    if kind == CUTMIX:
        cut = int(side * math.sqrt(share))
        x, y = (int(n) for n in chance.integers(side, size=2))
        box = (max(x - cut // 2, 0), max(y - cut // 2, 0), min(x + cut // 2, side), min(y + cut // 2, side))
        share = (box[2] - box[0]) * (box[3] - box[1]) / side**2
    amount = round(256 * share)
    if len(block) < 2 or not amount:
        return None
    place = int(u * (len(block) - 1))
    partner = block.start + place + (block.start + place >= i)
    return Mix(kind, partner, amount, box)


def mixed(own: np.ndarray, partner: np.ndarray, mix: Mix) -> np.ndarray:
    """A view image mixed with its partner's, both uint8 [S, S, 3] as rendered: uint8 [S, S, 3], in rounded integers."""
    if mix.kind == MIXUP:
        total = own.astype(np.uint16) * (256 - mix.amount) + partner.astype(np.uint16) * mix.amount
        return ((total + 128) >> 8).astype(np.uint8)
    left, top, right, bottom = mix.box
    image = own.copy()
    image[top:bottom, left:right] = partner[top:bottom, left:right]
    return image


def _middle(width: int, height: int, side: float) -> tuple[float, float, float, float]:
    left, top = (width - side) / 2, (height - side) / 2
    return (left, top, left + side, top + side)


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
        raise BadImage("cannot be decoded: it is no JPEG, PNG or WebP, or its beginning is damaged") from None
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

    The first frame of an animation; alpha is dropped; 16-bit grey is scaled to 8 bits. Other metadata is skipped.

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
    try:
        upright = ImageOps.exif_transpose(image)
    except Exception:  # the pixels are whole: metadata that cannot be read turns nothing
        upright = image
    upright.info.pop("transparency", None)  # a text chunk can call itself so, and then `convert` fails
    if upright.mode.startswith("I"):  # Pillow would clip 16-bit grey to white
        grey = np.asarray(upright).astype(np.uint32) >> 8
        upright = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
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
    pixels = np.array(frame, np.uint8)
    left, top, right, bottom = view.erased
    if right > left:
        noise = np.random.Generator(np.random.Philox(key=view.erase_seed)).bytes((right - left) * (bottom - top) * 3)
        pixels[top:bottom, left:right] = np.frombuffer(noise, np.uint8).reshape(bottom - top, right - left, 3)
    return pixels


def signature(pixels: np.ndarray) -> int:
    """The crc32c of a rendered image's bytes, kept in the bank and compared whenever it is rendered again."""
    return int(google_crc32c.value(np.ascontiguousarray(pixels).tobytes()))


@functools.lru_cache(maxsize=1)
def renderer() -> dict[str, str]:
    """What rendered: versions of Pillow and of its decoders."""
    libraries = {"libjpeg": "jpg", "zlib": "zlib", "webp": "webp"}
    versions = {name: str(features.version(feature)) for name, feature in libraries.items()}
    turbo = features.check_feature("libjpeg_turbo") and features.version_feature("libjpeg_turbo")
    return {"pillow": PIL.__version__, **versions, "libjpeg_turbo": str(turbo)}
