"""Shards: WebDataset tars read by byte ranges, and the index that makes this possible and safe.

A block is 64 consecutive samples and one ranged read. Nothing read from a tar is believed: keys, labels and the
digest of every image are compared with the index each time. No webdataset here, so that workers stay free of torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import braceexpand

from storage import records, schema
from storage.errors import DamageError, IdentityError, UserError, first_line
from storage.files import is_image, matching, tars_in
from storage.hints import folder_hint, pack_hint, there_are
from storage.names import all_normalized
from storage.objects import open_objects, read_range
from storage.tars import (
    RULE,
    Sample,
    as_sample,
    closing_zeros,
    compression,
    flaw,
    folder_of,
    members,
    open_file,
    repack,
    require_whole,
    size_of,
    stem_of,
    without_samples,
)
from storage.urls import is_remote, require_readable, separate

BLOCK = 64
INDEX_FORMAT = 1
MOST_ZEROS = 1 << 20  # bytes of a tar without members: more than this is a file that was never written
MANY = 1_000_000  # names that one pattern may stand for


@dataclass(frozen=True)
class Summary:
    """What is enough to recognise a shard without reading it: kept in the index and in every bank marker.

    `first` and `last` are (start, stop, sha256) of the bytes of the first and the last block.
    """

    id: str
    stem: str
    bytes: int
    samples: int
    labelled: bool
    first: tuple[int, int, str]
    last: tuple[int, int, str]


@dataclass(frozen=True)
class ShardIndex:
    """Where everything in one shard lies: `starts[i]` to `starts[i + 1]` are the tar's bytes of sample i.

    `left_out` says of each key that makes no sample why it makes none; its bytes stand between those of the samples.
    """

    summary: Summary
    keys: tuple[str, ...]
    digests: tuple[str, ...]
    labels: tuple[int | None, ...]
    starts: tuple[int, ...]
    left_out: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """`{stem}-{digest8}`: the identity of a shard's content."""
        return self.summary.id

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def blocks(self) -> int:
        """How many blocks the shard has."""
        return -(-len(self) // BLOCK)

    def block(self, number: int) -> range:
        """The indices of a block's samples."""
        return range(number * BLOCK, min((number + 1) * BLOCK, len(self)))

    def dump(self) -> bytes:
        """The index as a record."""
        summary = dataclasses.asdict(self.summary)
        columns = {"keys": self.keys, "digests": self.digests, "labels": self.labels, "starts": self.starts}
        if self.left_out:
            columns["left_out"] = self.left_out
        return records.dump({"format": INDEX_FORMAT, "kind": "index", "block": BLOCK, **summary, **columns})

    @classmethod
    def load(cls, data: bytes, name: str) -> ShardIndex:
        """The index in a record's bytes. Raises DamageError."""
        content = records.load(data, name)
        if content.get("kind") != "index" or content.get("format") != INDEX_FORMAT:
            raise DamageError(f"{name}: not a shard index of format {INDEX_FORMAT}")
        is_so = schema.checked(schema.IndexRecord, content, name, "Copy the file again from where it came from.")
        summary = Summary(*(getattr(is_so, field.name) for field in dataclasses.fields(Summary)))
        return cls(summary, is_so.keys, is_so.digests, is_so.labels, is_so.starts, is_so.left_out)


# ---------------------------------------------------------------------------------------------- names of shards


def expand(patterns: str | Sequence[str]) -> list[str]:
    """The shards that patterns name, in order: braces (`{000000..000004}`), `*` on local paths, `::` between several.

    Raises:
        UserError: a file that is not there (with the nearest one that is), a folder, the same shard twice.
    """
    urls: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for part in separate(str(pattern)):
            for url in braces(part):
                urls += _existing(url, str(pattern))
    if not urls:
        raise UserError("no shards were given")
    twice = sorted({url for url in urls if urls.count(url) > 1}) if len(set(urls)) < len(urls) else []
    if twice:
        raise UserError(f"{twice[0]}: the same shard is named twice")
    return urls


def braces(text: str) -> list[str]:
    """All that a text with braces stands for. Raises UserError."""
    try:
        found = list(itertools.islice(braceexpand.braceexpand(text), MANY + 1))
    except ValueError:
        raise UserError(f"{text}: its braces do not close; expected something like {{000000..000009}}") from None
    if len(found) > MANY:
        raise UserError(f"{text}: its braces stand for more than {MANY:,} names")
    return found


def _existing(url: str, pattern: str) -> list[str]:
    if is_remote(url):
        require_readable(url)
        return [url]
    path = Path(url.removeprefix("file://")).expanduser()
    if path.is_dir():
        raise UserError(folder_hint(path))
    if path.exists():
        if is_image(path):
            raise UserError(f"{path} is an image; shards are tar files. {pack_hint(path.parent.parent)}")
        if path.suffix.lower() == ".csv":
            raise UserError(f"{path} is a list; shards are tar files. {pack_hint(path)}")
        return [str(path)]
    there = [p.name for p in tars_in(path.parent) if p.exists()] if path.parent.is_dir() else []
    if any(c in str(path) for c in "*?["):
        if found := matching(str(path)):
            return found
        raise UserError(f"{pattern}: no file matches. {there_are(path, there)}")
    names = braces(pattern) if "::" not in pattern else []
    few = [name for name in names if Path(name).name in there]
    end = f"the last is {few[-1]!r}: let the braces end there, or make the others" if few else ""
    hint = f"{len(few)} of its {len(names)} names are there, {end}." if few else there_are(path, there)
    if "," in path.name and any(part in there for part in path.name.split(",")):
        hint = "Several shards are joined by ::, or given by a --shards each."
    raise UserError(f"{path}: no such shard (asked for by {pattern!r}). {hint}")


def classes_of(urls: Iterable[str]) -> list[str] | None:
    """The class names in the `classes.json` beside the shards, in order and in NFC; None where there is none.

    Raises:
        UserError: shards from several folders whose lists differ, or a file that is no list of distinct names.
    """
    found: dict[str, list[str]] = {}
    for folder in sorted({folder_of(url)[0] for url in urls}):
        name = f"{folder.rstrip('/')}/classes.json"
        try:
            content = json.loads(open_objects(folder).get("classes.json"))
        except FileNotFoundError:
            continue
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name}: not JSON: {first_line(error)}") from None
        good = isinstance(content, list) and content and all(isinstance(c, str) for c in content)
        names = all_normalized(content) if good else []
        if not names or len(set(names)) < len(names):
            raise UserError(f"{name}: expected a list of distinct class names, in the order of the labels")
        found[name] = names
    lists = list(found.values())
    if any(other != lists[0] for other in lists):
        raise UserError(f"the shards' class lists differ: {', '.join(found)}; training needs one list")
    return lists[0] if lists else None


def require_classes(urls: Sequence[str], expected: Sequence[str]) -> None:
    """Refuse shards whose class list is there and is another one. Raises IdentityError."""
    found, expected = classes_of(urls), all_normalized(expected)
    if found is None or found == expected:
        return
    where = f"{folder_of(urls[0])[0].rstrip('/')}/classes.json"
    do = "Give shards of the same classes, such as those that `pipeline pack … --val-fraction 0.1` cuts off."
    if len(found) == len(expected):
        at = next(i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b)
        raise IdentityError(where, f"class {at}", repr(expected[at]), repr(found[at]), do)
    raise IdentityError(where, "classes", _few(expected), _few(found), do)


def _few(names: Sequence[str]) -> str:
    return f"{len(names)} ({', '.join(names[:4])}{', …' if len(names) > 4 else ''})"


def build_index(url: str) -> ShardIndex:
    """Read a whole shard once and index it. Keys that make no sample are listed in it; see `require_whole`.

    An empty tar gives an index without samples.

    Raises:
        UserError: what DESIGN calls refused: compressed, truncated, without closing zero blocks, split or double keys.
    """
    keys, digests, labels, starts, left_out = [], [], [], [], []
    with open_file(url) as file:
        if kind := compression(file.read(512)):
            raise UserError(f"{url}: compressed with {kind}; a block cannot be read from the middle\n" + repack(url))
        file.seek(0)
        end = 0
        for key, parts, start, end in members(file, url):  # noqa: B007
            if why := flaw(key, parts):
                left_out.append(why)
                continue
            sample = as_sample(key, parts, url)
            keys.append(key)
            digests.append(_image_digest(sample.image))
            labels.append(sample.label)
            starts.append(start)
        if not end:
            file.seek(0)
            if file.read(512).strip(b"\0"):
                raise UserError(f"{url}: no samples in it; {RULE}")
        zeros = closing_zeros(file, end, url)
    if zeros < 1024:
        raise UserError(
            f"{url}: the closing zero blocks of the tar are missing: it may have been cut off between two samples\n"
            "  If it is known to be whole, pack it again:" + repack(url).partition(":")[2]
        )
    if not end and zeros > MOST_ZEROS:
        raise UserError(f"{url}: {zeros:,} bytes of zeros and nothing else; copy or make the file again")
    starts.append(end)
    whole = records.digest_of([keys, digests])
    ranges = []
    for number in (0, max(0, (len(keys) - 1) // BLOCK)):
        low, high = starts[number * BLOCK], starts[min((number + 1) * BLOCK, len(keys))]
        data = read_range(url, low, high)
        ranges.append((low, high, hashlib.sha256(data).hexdigest()))
    stem = stem_of(url)
    summary = Summary(
        id=f"{stem}-{whole[:8]}", stem=stem, bytes=end + zeros, samples=len(keys), labelled=None not in labels,
        first=ranges[0], last=ranges[1],
    )  # fmt: skip
    return ShardIndex(summary, tuple(keys), tuple(digests), tuple(labels), tuple(starts), tuple(left_out))


def with_samples(urls: Sequence[str], say: Callable[[str], None] = lambda line: None) -> list[str]:
    """The shards that have samples; `say` is told of the others. Raises UserError: none has any; as `cached_index`."""
    found = []
    for url in urls:
        if len(cached_index(url)):
            found.append(url)
        else:
            say(f"{url}: no samples in it")
    if urls and not found:
        raise without_samples(urls)
    return found


def _image_digest(image: bytes) -> str:
    return hashlib.sha256(image).hexdigest()[:32]


@functools.lru_cache(maxsize=1)
def cache_folder() -> Path:
    """Where indexes are kept when there is no store: `$TEACHER_STORE_CACHE`, else the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("TEACHER_STORE_CACHE") or f"{base}/teacher-store")


def cached_index(url: str, *, trust: bool = False, skip: bool = False) -> ShardIndex:
    """The index of a shard without a store: from the cache folder if the file is still the same, else built.

    Args:
        url: of the shard.
        trust: the first and last block are not looked at again; every sample is compared when it is read anyway.
        skip: take a shard in which some keys make no sample, too.

    Raises:
        UserError: as `build_index` and, without `skip`, `require_whole`.
    """
    index = _cached_index(url, trust)
    if not skip:
        require_whole(url, index.left_out)
    return index


def _cached_index(url: str, trust: bool) -> ShardIndex:
    name = hashlib.sha256(_state_of(url).encode()).hexdigest()[:32]
    cache = open_objects(cache_folder())
    try:
        index = ShardIndex.load(cache.get(f"{name}.json"), name)
        if trust or not differences(url, index.summary):
            return index
    except (OSError, DamageError):
        pass
    index = build_index(url)
    with contextlib.suppress(OSError):  # a read-only home is no reason to fail: it only costs time
        cache.put(f"{name}.json", index.dump())
    return index


def _state_of(url: str) -> str:
    """A file's place, size and time of change: another state is another entry in the cache."""
    if is_remote(url):
        return f"{url} {size_of(url)}"
    path = Path(url.removeprefix("file://")).resolve()
    try:
        state = path.stat()
    except OSError as error:
        raise UserError(f"{url}: cannot be opened: {first_line(error)}") from None
    return f"{path} {state.st_size} {state.st_mtime_ns}"


def differences(url: str, known: Summary) -> list[tuple[str, object, object]]:
    """(field, expected, found) where a file is not the shard that is known: its size, its first and last block.

    Tars are padded to 10 KiB, so one with another sample may be as large: after the last block there is nothing.
    """
    size = size_of(url)
    if size != known.bytes:
        return [("size in bytes", known.bytes, size)]
    found: list[tuple[str, object, object]] = []
    after = b""
    for name, (start, stop, digest) in (("first", known.first), ("last", known.last)):
        data = read_range(url, start, min(stop + 512, size))  # and the header of what comes after it
        there, after = hashlib.sha256(data[: stop - start]).hexdigest(), data[stop - start :]
        if there != digest:
            found.append((f"sha256 of the {name} block", digest[:16], there[:16]))
    if not found and any(after):
        found.append(("samples", known.samples, "more"))
    return found


def read_samples(url: str, index: ShardIndex, wanted: range) -> list[Sample]:
    """Consecutive samples of a shard, by one ranged read, compared with the index. Keys that make none are passed over.

    Raises:
        IdentityError: a key, an image or a label is not the one that the index knows.
        DamageError: the file ends too early.
    """
    data = read_range(url, index.starts[wanted.start], index.starts[wanted.stop])
    if not data:
        return []
    found = [as_sample(key, parts, url) for key, parts, _, _ in members(io.BytesIO(data), url) if not flaw(key, parts)]
    where = f"{url}, samples {wanted.start} to {wanted.stop - 1}"
    again = "The shard changed since it was indexed; targets belong to a shard's exact content."
    if len(found) != len(wanted):
        raise IdentityError(where, "samples", len(wanted), len(found), again)
    for i, sample in zip(wanted, found, strict=True):
        if sample.key != index.keys[i]:
            raise IdentityError(where, f"key of sample {i}", index.keys[i], sample.key, again)
        digest = _image_digest(sample.image)
        if digest != index.digests[i]:
            raise IdentityError(f"{url}, key {sample.key}", "image digest", index.digests[i], digest, again)
        if sample.label != index.labels[i]:
            raise IdentityError(f"{url}, key {sample.key}", "label", index.labels[i], sample.label, again)
    return found


def require_labels(url: str, index: ShardIndex, classes: int | None = None) -> None:
    """UserError, with a key, where a sample has no label, or one that there is no class for."""
    if not index.summary.labelled:
        key = next(k for k, label in zip(index.keys, index.labels, strict=True) if label is None)
        raise UserError(
            f"{url}: key {key!r} has no label (.cls), and a loss or an evaluation needs labels: a shard has them for "
            "all of its samples or for none"
        )
    highest = max((label for label in index.labels if label is not None), default=-1)
    if classes is not None and highest >= classes:
        key = index.keys[index.labels.index(highest)]
        raise UserError(f"{url}: key {key!r} has label {highest}, there are classes 0 to {classes - 1}")
