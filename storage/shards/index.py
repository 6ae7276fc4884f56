"""The index of a shard: keys, byte ranges, labels and digests, which make reading by ranges possible and safe."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
from dataclasses import dataclass
from pathlib import Path

from storage.constants import BLOCK
from storage.errors import DamageError, IdentityError, UserError, first_line
from storage.objects import json_record
from storage.objects.object_store import COPY_AGAIN, open_object_store, read_range
from storage.objects.record_schema import IndexRecord, SummaryRecord, checked
from storage.objects.urls import is_remote
from storage.shards import tar
from storage.shards.plain_headers import image_digest, plain_samples

INDEX_FORMAT = 1

MOST_ZEROS = 1 << 20  # bytes of a tar without members: more than this is a file that was never written


@dataclass(frozen=True)
class ShardIndex:
    """Where everything in one shard lies: `starts[i]` to `starts[i + 1]` are the tar's bytes of sample i.

    `left_out` says of each key that makes no sample why it makes none; its bytes stand between those of the samples.
    """

    summary: SummaryRecord
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
        columns = {"keys": self.keys, "digests": self.digests, "labels": self.labels, "starts": self.starts}
        if self.left_out:
            columns["left_out"] = self.left_out
        return json_record.to_json(
            {"format": INDEX_FORMAT, "kind": "index", "block": BLOCK, **self.summary.plain(), **columns}
        )

    @classmethod
    def load(cls, data: bytes, name: str) -> ShardIndex:
        """The index in a record's bytes. Raises DamageError."""
        content = json_record.from_json(data, name)
        if content.get("kind") != "index" or content.get("format") != INDEX_FORMAT:
            raise DamageError(f"{name}: not a shard index of format {INDEX_FORMAT}")
        record = checked(IndexRecord, content, name, "Copy the file again from where it came from.")
        summary = SummaryRecord.model_validate(record.model_dump(include={*SummaryRecord.model_fields}))
        return cls(summary, record.keys, record.digests, record.labels, record.starts, record.left_out)


def build_index(url: str) -> ShardIndex:
    """Read a whole shard once and index it. Keys that make no sample are listed in it; see `require_whole`.

    An empty tar gives an index without samples.

    Raises:
        UserError: what DESIGN calls refused: compressed, truncated, without closing zero blocks, split or double keys.
    """
    keys, digests, labels, starts, left_out = [], [], [], [], []
    with tar.open_file(url) as file:
        if kind := tar.compression(file.read(512)):
            message = f"{url}: compressed with {kind}; a block cannot be read from the middle"
            raise UserError(message, hint=f"Pack it again: {tar.repack(url)}")
        file.seek(0)
        end = 0
        for key, parts, start, end in tar.iter_samples(file, url):  # noqa: B007
            if why := tar.flaw(key, parts):
                left_out.append(why)
                continue
            sample = tar.to_sample(key, parts, url)
            keys.append(key)
            digests.append(image_digest(sample.image))
            labels.append(sample.label)
            starts.append(start)
        if not end:
            file.seek(0)
            if file.read(512).strip(b"\0"):
                raise UserError(f"{url}: no samples in it; {tar.RULE}")
        zeros = tar.closing_zeros(file, end, url)
    if zeros < 1024:
        message = f"{url}: the closing zero blocks of the tar are missing: it may have been cut off between two samples"
        raise UserError(message, hint=f"If it is known to be complete, pack it again: {tar.repack(url)}")
    if not end and zeros > MOST_ZEROS:
        raise UserError(f"{url}: {zeros:,} bytes of zeros and nothing else", hint=COPY_AGAIN)
    starts.append(end)
    last = max(0, (len(keys) - 1) // BLOCK)
    bounds = [(starts[n * BLOCK], starts[min((n + 1) * BLOCK, len(keys))]) for n in (0, last)]
    blocks = [(low, high, hashlib.sha256(read_range(url, low, high)).hexdigest()) for low, high in bounds]
    stem = tar.stem_of(url)
    summary = SummaryRecord(
        id=f"{stem}-{json_record.digest_of([keys, digests])[:8]}",
        stem=stem,
        bytes=end + zeros,
        samples=len(keys),
        labelled=None not in labels,
        first=blocks[0],
        last=blocks[1],
    )
    return ShardIndex(summary, tuple(keys), tuple(digests), tuple(labels), tuple(starts), tuple(left_out))


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
    name = hashlib.sha256(_state_of(url).encode()).hexdigest()[:32]
    cache = open_object_store(cache_folder())
    try:
        index = ShardIndex.load(cache.get(f"{name}.json"), name)
        is_current = trust or is_same_shard(url, index.summary)
    except (OSError, DamageError):
        is_current = False
    if not is_current:
        index = build_index(url)
        with contextlib.suppress(OSError):  # a read-only home is no reason to fail: it only costs time
            cache.put(f"{name}.json", index.dump())
    if not skip:
        tar.require_whole(url, index.left_out)
    return index


def _state_of(url: str) -> str:
    """A file's place, size and time of change: another state is another entry in the cache."""
    if is_remote(url):
        return f"{url} {tar.size_of(url)}"
    path = Path(url.removeprefix("file://")).resolve()
    try:
        state = path.stat()
    except OSError as error:
        raise UserError(f"{url}: cannot be opened: {first_line(error)}") from None
    return f"{path} {state.st_size} {state.st_mtime_ns}"


def is_same_shard(url: str, known: SummaryRecord) -> bool:
    """Whether a file is the shard that is known: its size, its first and last block.

    Tars are padded to 10 KiB, so one with another sample may be as large: after the last block there is nothing.
    """
    size, after = tar.size_of(url), b""
    if size != known.bytes:
        return False
    for start, stop, digest in (known.first, known.last):
        data = read_range(url, start, min(stop + 512, size))  # and the header of what comes after it
        after = data[stop - start :]
        if hashlib.sha256(data[: stop - start]).hexdigest() != digest:
            return False
    return not any(after)


def read_samples(url: str, index: ShardIndex, indices: range) -> list[tar.Sample]:
    """Consecutive samples of a shard, by one ranged read, compared with the index. Keys that make none are passed over.

    Raises:
        IdentityError: a key, an image or a label is not the one that the index knows.
        DamageError: the file ends too early.
    """
    data = read_range(url, index.starts[indices.start], index.starts[indices.stop])
    if not data:
        return []
    starts = index.starts[indices.start : indices.stop + 1]
    keys, digests = (column[indices.start : indices.stop] for column in (index.keys, index.digests))
    if (found := plain_samples(data, starts, keys, digests, index.labels[indices.start : indices.stop])) is not None:
        return found
    members = ((key, parts) for key, parts, _, _ in tar.iter_samples(io.BytesIO(data), url))
    samples = [tar.to_sample(key, parts, url) for key, parts in members if not tar.flaw(key, parts)]
    where = f"{url}, samples {indices.start} to {indices.stop - 1}"
    hint = "The shard changed since it was indexed; targets belong to a shard's exact content."
    if len(samples) != len(indices):
        raise IdentityError(where, "samples", len(indices), len(samples), hint)
    for i, sample in zip(indices, samples, strict=True):
        if sample.key != index.keys[i]:
            raise IdentityError(where, f"key of sample {i}", index.keys[i], sample.key, hint)
        digest = image_digest(sample.image)
        if digest != index.digests[i]:
            raise IdentityError(f"{url}, key {sample.key}", "image digest", index.digests[i], digest, hint)
        if sample.label != index.labels[i]:
            raise IdentityError(f"{url}, key {sample.key}", "label", index.labels[i], sample.label, hint)
    return samples
