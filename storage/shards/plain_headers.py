"""Samples with ordinary tar headers, read at the places that an index names, without tarfile.

A training run reads every sample again in every epoch, and tarfile takes longer for a small sample than its image takes
to decode. What is read here is exactly what `iter_samples` and `to_sample` give. Where a sample is not as the index
says, or has a header that is not an ordinary one, nothing is read here: those two read the range and say what is wrong.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

import numpy as np

from storage.shards.tar import IMAGES, MAX_MEMBER_BYTES, Sample

if TYPE_CHECKING:
    from collections.abc import Sequence

# A key that `split_name` gives back whole, of a name that `iter_samples` neither refuses nor passes over.
_KEY = re.compile(r"(?!/|__)(?:(?!\.\.?/)[^/\0\ud800-\udfff]+/)*[^./\0\ud800-\udfff]+")
_HARMLESS = re.compile(rb"(?:[0-9]+ (?:mtime|atime|ctime)=-?[0-9.]+\n)+")  # extended headers that change no bytes
_DIGITS = np.array([8**5, 8**4, 8**3, 8**2, 8, 1], np.int64)
_REGULAR, _EXTENDED = b"0\0", ord("x")  # types of members


def image_digest(image: bytes) -> str:
    """The digest of an image: the first half of its sha256."""
    return hashlib.sha256(image).hexdigest()[:32]


def plain_samples(
    data: bytes, starts: Sequence[int], keys: Sequence[str], digests: Sequence[str], labels: Sequence[int | None]
) -> list[Sample] | None:
    """Consecutive samples in a shard's bytes, whose keys, image digests and labels are those of its index.

    Args:
        data: the tar's bytes from the first sample's start to the last one's end.
        starts: where each sample begins in the tar, and where the last one ends.
        keys: of the samples, by the index.
        digests: of their images, by the index.
        labels: of the samples, by the index.

    Returns:
        The samples; None where one is not as the index says, or has a header that only tarfile reads.
    """
    samples, headers = list[Sample](), list[int]()
    try:
        for i, key in enumerate(keys):
            members = _members(data, key, starts[i] - starts[0], starts[i + 1] - starts[0], headers)
            sample = _sample(members, key, digests[i], labels[i])
            if sample is None:
                return None
            samples.append(sample)
    except (ValueError, IndexError):  # a size that is no octal number, a name without an end, a header that is cut off
        return None
    return samples if _intact(data, headers) else None


def _members(data: bytes, key: str, at: int, end: int, headers: list[int]) -> dict[str, bytes]:
    """Extension -> bytes of the members of a key, which are all that stands between two places; none if they are not.

    Where each header begins is added to `headers`.
    """
    members: dict[str, bytes] = {}
    if at % 512 or end > len(data) or not _KEY.fullmatch(key):
        return {}
    name = key.encode() + b"."
    while at < end:
        size = int(data[at + 124 : at + 135], 8)
        begin = at + 512
        stop = begin + size
        if not 0 <= size <= MAX_MEMBER_BYTES or stop > end or data[at + 135] not in b"\0 ":
            return {}
        headers.append(at)
        if data[at + 156] == _EXTENDED:
            if not _HARMLESS.fullmatch(data, begin, stop):
                return {}
        else:
            # 345: the first part of a long name
            if data[at + 156] not in _REGULAR or data[at + 345] or not data.startswith(name, at):
                return {}
            kind = data[at + len(name) : data.index(0, at, at + 100)].decode("ascii").lower()
            if not kind or "/" in kind or kind in members:
                return {}
            members[kind] = data[begin:stop]
        at = begin + -(-size // 512) * 512
    return members if at == end else {}


def _sample(members: dict[str, bytes], key: str, digest: str, label: int | None) -> Sample | None:
    """The sample that a key's members make; None where they make none, or not the one that the index knows."""
    images = [kind for kind in members if kind in IMAGES]
    if len(images) != 1 or any(kind.startswith("__") for kind in members):
        return None
    if "cls" in members:
        text = members["cls"].strip()
        is_same = text.isdigit() and len(text) <= 9 and int(text) == label
    else:
        is_same = label is None
    image = members[images[0]]
    if not is_same or image_digest(image) != digest:
        return None
    return Sample(key=key, kind=images[0], image=image, label=label, json=members.get("json"))


def _intact(data: bytes, headers: list[int]) -> bool:
    """Whether each header states its checksum in the usual form, and rightly."""
    blocks = np.frombuffer(data, np.uint8, len(data) // 512 * 512).reshape(-1, 512)
    rows = blocks[np.array(headers, np.int64) // 512]
    field = rows[:, 148:156]  # six octal digits, NUL and a space; summed as if it were eight spaces
    digits = field[:, :6].astype(np.int64) - ord("0")
    usual = ((digits >= 0) & (digits < 8)).all() and (field[:, 6:] == (0, ord(" "))).all()
    sums = rows.sum(1, dtype=np.int64) - field.sum(1, dtype=np.int64) + 8 * ord(" ")
    return bool(usual and (digits @ _DIGITS == sums).all())
