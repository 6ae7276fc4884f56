"""Views: the explicit parameters that turn a sample's bytes into one uint8 image, and the one function that does it.

`draw` finds parameters, `render` obeys them; the store keeps the parameters and a signature of the pixels. Both sides,
the teacher's and the student's, call `render`, made only of Pillow's uint8 operations, which are bit-exact everywhere.
"""

from __future__ import annotations

import functools
import hashlib
import io
from dataclasses import dataclass

import google_crc32c
import numpy as np
import PIL
from PIL import Image, ImageOps, features

from storage import records
from storage.errors import UserError
from storage.policies import Policy

# More pixels than any photograph has; fewer than make a machine swap. Pillow's own limit only warns at half of it.
MAX_PIXELS = 178_956_970
FORMATS = ("JPEG", "PNG", "WEBP")

# The columns of a bank, all of them from the first version on; operations of later policies leave theirs at zero.
COLUMNS = (
    "valid",
    "left", "top", "right", "bottom",  # crop box in the source image's pixels, resized to S×S (bicubic)
    "shift_x", "shift_y",  # the S×S frame is moved by whole pixels; what comes in is black
    "flip",
    "op1", "magnitude1", "op2", "magnitude2", "op3", "magnitude3", "op4", "magnitude4",
    "erase_left", "erase_top", "erase_right", "erase_bottom", "erase_seed",
    "mix", "partner", "amount", "mix_left", "mix_top", "mix_right", "mix_bottom",
)  # fmt: skip


class BadImage(UserError):
    """Bytes that cannot be rendered; the message says why."""


@dataclass(frozen=True)
class View:
    """The parameters of one view image. Boxes are (left, top, right, bottom)."""

    box: tuple[float, float, float, float]
    shift: tuple[int, int] = (0, 0)
    flip: bool = False
    valid: bool = True

    def row(self) -> np.ndarray:
        """The view as one row of a bank, f64 [columns]."""
        row = np.zeros(len(COLUMNS), np.float64)
        row[0] = self.valid
        row[1:5] = self.box
        row[5:7] = self.shift
        row[7] = self.flip
        row[COLUMNS.index("partner")] = -1
        return row

    @classmethod
    def of(cls, row: np.ndarray) -> View:
        """The view that a row of a bank says."""
        left, top, right, bottom = (float(x) for x in row[1:5])
        return cls((left, top, right, bottom), (int(row[5]), int(row[6])), bool(row[7]), bool(row[0]))


INVALID = View((0, 0, 0, 0), valid=False)


def generator(*arguments: object) -> np.random.Generator:
    """NumPy's Philox keyed by a digest of the arguments: what is drawn depends on nothing else."""
    key = hashlib.sha256(records.canonical(list(arguments))).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def draw(policy: Policy, key: str, view: int, image_size: tuple[int, int]) -> View:
    """The view of a sample with this number under a policy.

    Chance comes from (line, seed, key, view) alone; the size (width, height) of the image turns it into pixels.
    """
    chance = generator("view", policy.line, policy.seed, key, view)
    width, height = image_size
    side = policy.size
    box, shift, flip = (0.0, 0.0, float(width), float(height)), (0, 0), False
    for name, arguments in policy.operations:
        if name == "short":  # the short side becomes round(S/f); `center` then keeps the middle S×S of it
            short = min(width, height) * side / round(side / arguments[0])
            box = _middle(width, height, short)
        elif name == "crop":
            border = round(arguments[0] * side)
            box = _middle(width, height, min(width, height))
            x, y = (int(n) for n in chance.integers(-border, border, size=2, endpoint=True))
            shift = (x, y)
        elif name == "flip":
            flip = bool(chance.integers(2))
    return View(box, shift, flip)


def _middle(width: int, height: int, side: float) -> tuple[float, float, float, float]:
    left, top = (width - side) / 2, (height - side) / 2
    return (left, top, left + side, top + side)


def decode(data: bytes) -> Image.Image:
    """The RGB image in a sample's bytes, turned upright by its EXIF orientation.

    The first frame of an animation; alpha is dropped; 16-bit grey is scaled to 8 bits.

    Raises:
        BadImage: not a whole JPEG, PNG or WebP, or more pixels than MAX_PIXELS.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise BadImage(f"{image.width}x{image.height} pixels, more than {MAX_PIXELS:,} are refused")
        image.load()
    except BadImage:
        raise
    except Exception as error:  # decoders raise anything on hostile bytes: OSError, SyntaxError, struct.error, …
        raise BadImage(f"cannot be decoded: {error or type(error).__name__}") from None
    try:
        upright = ImageOps.exif_transpose(image)
    except Exception:  # the pixels are whole: metadata that cannot be read turns nothing
        upright = image
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
    return np.array(frame, np.uint8)


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
