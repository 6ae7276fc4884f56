"""Small tars, pictures and stores that the tests of this room are made of."""

from __future__ import annotations

import functools
import io
import shlex
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.messages import as_flags
from storage.errors import UserError
from storage.shards.index import ShardIndex, build_index, read_samples
from storage.shards.pack import PackResult, pack
from storage.shards.tar import require_whole
from storage.store.attempts import Attempt
from storage.store.banks import bank_manifest, view_rows
from storage.store.codecs import Codec
from storage.store.manifests import TargetManifest
from storage.store.markers import Marker, Task
from storage.store.store import Store
from storage.testing import synthetic_shards
from storage.views.draw import draw_view
from storage.views.policy import policy
from storage.views.render import render, renderer, signature
from storage.views.view import COLUMNS

Members = Sequence[tuple[str, bytes]]


@functools.cache
def picture(number: int, kind: str = "PNG", size: tuple[int, int] = (5, 4)) -> bytes:
    """The bytes of an image that no other number has."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def sample(key: str, number: int, label: int | str | None = 0) -> list[tuple[str, bytes]]:
    """The members of one sample."""
    cls = [] if label is None else [(f"{key}.cls", str(label).encode())]
    return [*cls, (f"{key}.png", picture(number))]


def samples(count: int, first: int = 0) -> list[tuple[str, bytes]]:
    """The members of several samples, `s000`, `s001`, …, of three classes."""
    return [member for i in range(first, first + count) for member in sample(f"s{i:03d}", i, i % 3)]


def write_tar(path: Path, members: Members, mode: str = "w", mtime: int = 0, **settings: Any) -> str:
    """A tar of plain files; the path as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, **{"format": tarfile.USTAR_FORMAT, **settings}) as tar:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), mtime
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def class_folders(folder: Path, counts: dict[str, int], kind: str = "png") -> Path:
    """One folder a class with so many images each."""
    number = 0
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            formats = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
            (folder / name / f"{i:03d}.{kind}").write_bytes(picture(number, formats[kind]))
            number += 1
    return folder


def by_webdataset(*paths: str) -> list[tuple[str, dict[str, bytes]]]:
    """(key, members) of each sample as webdataset reads them."""
    import webdataset

    found = webdataset.WebDataset(list(paths), shardshuffle=False)
    return [(s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")}) for s in found]


def by_us(*paths: str) -> list[tuple[str, dict[str, bytes]]]:
    """(key, members) of each sample as this project reads them."""
    found = []
    for path in paths:
        index = build_index(path)
        for s in read_samples(path, index, range(len(index))):
            members = {s.kind: s.image}
            if s.label is not None:
                members["cls"] = str(s.label).encode()
            if s.json is not None:
                members["json"] = s.json
            found.append((s.key, members))
    return found


MADE = {"bank_views": 64 * "0"}  # what the marker of a target says, of no bank


class SmallStore:
    """A store with one bank over small shards, and targets of made-up values, without any teacher."""

    values: dict[Task, np.ndarray]  # of the target that the store was made with, where there is one

    def __init__(self, where: Any, shards: Sequence[str], views: int = 2) -> None:
        self.store = Store.create(where)
        self.shards = list(shards)
        self.policy = policy("light", 8)
        self.indexes = [build_index(url) for url in shards]
        self.views = views
        self.store.add(bank_manifest(self.policy))
        for url, index in zip(self.shards, self.indexes, strict=True):
            self.store.add_index(index, url)
            for view in range(views):
                self.add_bank_view(url, index, view)

    def add_bank_view(self, url: str, index: ShardIndex, view: int) -> Marker:
        originals = read_samples(url, index, range(len(index)))
        drawn = [draw_view(self.policy, s.key, view, (16, 12)) for s in originals]
        crcs = [signature(render(s.image, v, self.policy.size)) for s, v in zip(originals, drawn, strict=True)]
        attempt = Attempt(self.store, Task("bank", self.policy.bank, index.id, view), len(index))
        attempt.array("parameters", (len(COLUMNS),), "float64", ["column"]).append(view_rows(drawn))
        attempt.array("signatures", (1,), "uint32", ["column"]).append(np.array(crcs, np.uint32)[:, None])
        return attempt.commit({"summary": index.summary.plain(), "invalid": [], "renderer": renderer()})

    def add_target(self, id: str, codec: str = "u8", shape: tuple[int, ...] = (3, 4, 4)) -> dict[Task, np.ndarray]:
        """Record a target with values for every shard and view; the values."""
        identity = {
            "teacher": "none",
            "bank": self.policy.bank,
            "tap": "made up",
            "layers": None,
            "grid": None,
            "codec": codec,
        }
        axes = [f"axis{i}" for i in range(len(shape))]
        about = {"sample_shape": list(shape), "axes": axes, "maps": 2, "parity": None, "attention_error": None}
        about |= {"identity": identity, "teacher": "none", "graph": None, "output": None}
        self.store.add(TargetManifest.model_validate({"format": 1, "kind": "target", "id": id, **about}))
        values = {}
        for number, index in enumerate(self.indexes):
            for view in range(self.views):
                task = Task("target", id, index.id, view)
                values[task] = (
                    np.random.default_rng([number, view]).normal(size=(len(index), *shape)).astype(np.float32)
                )
                self.attempt(task, codec, values[task]).commit(MADE)
        return values

    def attempt(self, task: Task, codec: str, values: np.ndarray) -> Attempt:
        """An attempt that holds all of its values and is not committed."""
        attempt = Attempt(self.store, task, len(values))
        encoded = encode(codec, values, 2)
        for name, (dtype, shape) in layout(codec, values.shape[1:], 2).items():
            attempt.array(name, shape, dtype, [f"axis{i}" for i in range(len(shape))]).append(encoded[name])
        return attempt


def encode(codec: str, values: np.ndarray, maps: int, **options: Any) -> dict[str, np.ndarray]:
    return Codec(codec, values.shape[1:], maps).encode(values, **options)


def decode(codec: str, arrays: Any) -> Any:
    """Of a codec that needs no shape to be told."""
    return Codec(codec, tuple(arrays["data"].shape[1:]), 1).decode(arrays)


def layout(codec: str, shape: tuple[int, ...], maps: int, **options: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (part.dtype, part.shape) for name, part in Codec(codec, shape, maps).layout(**options).items()}


def small_store(where: Any, data: Path, shards: int = 2, views: int = 2, count: int = 70) -> SmallStore:
    """See `SmallStore`; `count` samples a shard, so more than one block."""
    return SmallStore(where, synthetic_shards(data, shards=shards, samples=count, size=(16, 12)), views)


def files_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def decoded(store: Store, task: Task, codec: str | None = None) -> np.ndarray:
    """The values that a marker speaks of, kept as its manifest says or as another codec."""
    arrays = {name: array.read(0, array.shape[0]) for name, array in store.marker(task).arrays.items()}
    values: np.ndarray = decode(codec, arrays) if codec else store.target(task.id).codec.decode(arrays)
    return values


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """An image in which every pixel matters."""
    channels = {"RGB": 3, "RGBA": 4, "CMYK": 4, "LA": 2}.get(mode)
    shape = (height, width, channels) if channels else (height, width)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    return Image.frombytes(mode, (width, height), pixels.tobytes())


def encoded(image: Image.Image, kind: str, **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def same(found, expected) -> bool:
    return np.array_equal(np.asarray(found), np.asarray(expected))


def with_orientation(image: Image.Image, orientation: int, kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))


def optional_features() -> str:
    """What this processor has of NumPy's dispatched features."""
    from numpy._core import _multiarray_umath as umath  # type: ignore[attr-defined]  # private, and nothing else tells

    return " ".join(name for name in umath.__cpu_dispatch__ if umath.__cpu_features__.get(name))


def labels_in(*paths: str) -> Counter[int | None]:
    return Counter(label for path in paths for label in build_index(path).labels)


def digests_in(*paths: str) -> list[str]:
    return [digest for path in paths for digest in build_index(path).digests]


def keys_in(*paths: str) -> list[str]:
    return [key for path in paths for key in build_index(path).keys]


def packed(source: Any, out: Path, name: str = "x-{000000..000001}.tar", **settings: Any) -> PackResult:
    return pack(source if isinstance(source, list) else str(source), str(out / name), **settings)


def command_in(message: str) -> list[str]:
    """The arguments of the `pipeline pack` command that a message tells on the command line."""
    line = next(line for line in as_flags(message).splitlines() if "pipeline pack" in line)
    return shlex.split(line[line.index("pipeline pack") :].rstrip("`"))[2:]


def patched(path: str, old: bytes, new: bytes) -> None:
    """Replace bytes of a tar by as many others, and mend the checksums of all headers."""
    assert len(old) == len(new)
    data = bytearray(Path(path).read_bytes())
    assert old in data
    data = bytearray(data.replace(old, new))
    for at in range(0, len(data), 512):
        if data[at + 257 : at + 262] == b"ustar":
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    Path(path).write_bytes(data)


def refusal(path: str) -> str:
    """The message with which a tar is refused; it must name the file."""
    with pytest.raises(UserError) as error:
        require_whole(path, build_index(path).left_out)
    assert path in str(error.value)
    return str(error.value)
