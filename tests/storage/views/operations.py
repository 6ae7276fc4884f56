"""Everything that is drawn and rendered under `deit` and its like, as names and digests."""

from __future__ import annotations

import functools
import hashlib
from typing import TYPE_CHECKING

import numpy as np

from storage.testing import synthetic_image
from storage.views.draw import draw_view
from storage.views.mixing import mix_images
from storage.views.policy import policy
from storage.views.randaugment import OPERATIONS
from storage.views.render import decode, render
from storage.views.view import View
from tests.storage.helpers import encoded, noise, with_orientation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from PIL import Image

DEIT = policy("deit", 48, 3)
NUMBERS = {name: number for number, (name, _) in OPERATIONS.items()}

# Small and large arguments of each operation.
ARGUMENTS: dict[str, tuple[float, ...]] = {
    "auto_contrast": (0,),
    "equalize": (0,),
    "invert": (0,),
    "rotate": (-30, -0.37, 0.001, 17.3, 30),
    "posterize": (1, 2, 4, 8),
    "solarize": (0, 26, 128, 256),
    "solarize_add": (0, 1, 60, 110, 128),
    **dict.fromkeys(["color", "contrast", "brightness", "sharpness"], (0.1, 0.73, 1.0, 1.0001, 1.37, 1.9)),
    **dict.fromkeys(["shear_x", "shear_y"], (-0.3, -0.013, 0.0007, 0.3)),
    **dict.fromkeys(["translate_x", "translate_y"], (-0.45, -0.003, 0.1234567, 0.45)),
}


def pictures() -> dict[str, bytes]:
    """Images of every format and of shapes that are awkward."""
    photo = synthetic_image(2, np.random.default_rng(2), (233, 151))
    sizes = {"odd": (61, 47), "one pixel": (1, 1), "a column": (1, 50), "very wide": (700, 5), "tall": (33, 190)}
    images = {
        f"{name} {kind}": encoded(noise(*size), kind)
        for name, size in sizes.items()
        for kind in ("PNG", "JPEG", "WEBP")
    }
    return {
        **images,
        "photo PNG": encoded(photo, "PNG"),
        "photo JPEG": encoded(photo, "JPEG", quality=75),
        "photo JPEG, progressive": encoded(photo, "JPEG", quality=60, progressive=True, subsampling=1),
        "photo JPEG, full color": encoded(photo, "JPEG", quality=95, subsampling=0),
        "photo WEBP": encoded(photo, "WEBP", quality=70),
        "photo WEBP, lossless": encoded(photo, "WEBP", lossless=True),
        "photo turned": with_orientation(photo, 6, "JPEG"),
        "gray JPEG": encoded(photo.convert("L"), "JPEG"),
        "CMYK JPEG": encoded(noise(40, 31, "CMYK"), "JPEG"),
        "palette": encoded(photo.convert("P"), "PNG"),
        "alpha": encoded(noise(23, 40, "RGBA"), "WEBP", lossless=True),
    }


def framings(width: int, height: int) -> dict[str, View]:
    """Views of every operation but those of RandAugment."""
    whole = (0.0, 0.0, float(width), float(height))
    middle = (width * 0.3, height * 0.21, width * 0.3 + max(width * 0.4, 0.7), height * 0.21 + max(height * 0.61, 0.6))
    corner = (float(width // 2), float(height // 3), float(width), float(height))
    return {
        "whole": View(whole),
        "middle": View(middle),
        "corner, flipped": View(corner, flip=True),
        "moved": View(whole, shift=(5, -3), flip=True),
        "erased": View(middle, erased=(3, 5, 30, 33), erase_seed=2**32 - 1),
        "all of it": View(
            corner,
            flip=True,
            operations=((NUMBERS["rotate"], 13.7), (NUMBERS["color"], 1.81)),
            erased=(0, 0, 20, 36),
            erase_seed=1,
        ),
    }


def jobs(images: dict[str, bytes]) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Everything that is rendered: its name, and what gives its bytes."""
    for name, data in images.items():
        yield f"decode {name}", functools.partial(_decoded, data)
        for what, view in framings(*decode(data).size).items():
            yield f"{what}: {name}", functools.partial(_rendered, data, view)
    for name in ("photo JPEG", "odd PNG", "very wide WEBP"):
        image = decode(images[name])
        for operation, arguments in ARGUMENTS.items():
            for argument in arguments:
                view = View((0, 0, image.width, image.height), operations=((NUMBERS[operation], argument),))
                yield f"{operation} {argument}: {name}", functools.partial(_rendered, image, view)
    for i in range(200):
        yield f"deit {i}", functools.partial(drawn_pixels, images, i)


def _decoded(data: bytes) -> bytes:
    return decode(data).tobytes()


def _rendered(image: bytes | Image.Image, view: View) -> bytes:
    return render(image, view, 37).tobytes()


def drawn_view(images: dict[str, bytes], i: int) -> tuple[bytes, View]:
    """One of 200 drawn views, mixed within blocks of eight."""
    data = images[sorted(images)[i % len(images)]]
    block = range(i // 8 * 8, i // 8 * 8 + 8)
    return data, draw_view(DEIT, f"key {i}", i % 4, decode(data).size, i=i, block=block)


def drawn_pixels(images: dict[str, bytes], i: int) -> bytes:
    data, view = drawn_view(images, i)
    own = render(data, view, DEIT.size)
    if view.mix is None:
        return own.tobytes()
    other = render(*drawn_view(images, view.mix.partner), DEIT.size)
    return mix_images(own, other, view.mix).tobytes()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def pixel_digests(images: dict[str, bytes]) -> dict[str, str]:
    """Name -> digest of the bytes of everything that is rendered."""
    return {name: digest(work()) for name, work in jobs(images)}


LINES = ["deit", "rrc(0.3,0.9)|erase(1)|mix(0.2,0)", "resize|randaug(5,3)|mix(0,3.5)", "crop(0.2)|mix(7,0.4)"]


def draw_digests() -> dict[str, str]:
    """Name -> digest of the rows of drawn views: every bit of every parameter."""
    sizes = [(500, 375), (32, 32), (1, 1), (3, 900), (61, 47)]
    return {
        f"{line}, seed {seed}, {width}x{height}": digest(
            b"".join(
                draw_view(policy(line, 224, seed), f"key {i}", i % 5, (width, height), i=i, block=range(64))
                .row()
                .tobytes()
                for i in range(60)
            )
        )
        for line in LINES
        for seed in (0, 2**63 - 1)
        for width, height in sizes
    }
