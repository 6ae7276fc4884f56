"""Tars as WebDataset writes them, read without webdataset: members, keys, samples, and what is refused."""

from __future__ import annotations

import contextlib
import io
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Self

from storage.errors import UserError, call, first_few, first_line, is_transient
from storage.objects.object_store import COPY_AGAIN, open_object_store
from storage.objects.urls import filesystem_of, is_remote, networked, require_ranges, require_readable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

IMAGES = ("jpg", "jpeg", "png", "webp")
MAX_MEMBER_BYTES = 1 << 30  # bytes of one member, which is read whole: more than any image has
_NETWORK = {"aiohttp", "aiobotocore", "azure", "botocore", "gcsfs", "google", "requests", "s3fs", "urllib3"}
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}

# headers that name or describe the member after them
_EXTENDED = {tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE}
_EXTENDED |= {tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}

RULE = (
    "a sample is a key with one image, KEY.jpg, .jpeg, .png or .webp, that is a plain file; a key ends at the first "
    "dot of a file's name"
)
Part = tuple[str, bytes | None]  # the extension and the bytes of a member; None for those of a link


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One image with what belongs to it, as read from a tar."""

    key: str
    kind: str  # the image's extension
    image: bytes
    label: int | None
    json: bytes | None = None


class _Header(tarfile.TarInfo):
    """A header whose size is plausible: tarfile follows negative ones, and reads long names of any size into memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """The header in 512 bytes. Raises ValueError, beside what tarfile raises."""
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in _EXTENDED and header.size > 1 << 20):
            raise ValueError(f"a header claims {header.size} bytes")
        return header


def split_name(name: str) -> tuple[str, str] | None:
    """(key, extension) of a member's name, by WebDataset's rule: the key ends at the first dot of the last part."""
    match = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", name)
    return (match[1], match[2].lower()) if match else None


def iter_samples(file: IO[bytes], where: str, *, together: bool = True) -> Iterator[tuple[str, list[Part], int, int]]:
    """(key, [(extension, bytes)], start, end) of each key of a tar, in order; start and end in the tar's bytes.

    Members without an extension, folders and `__meta__` members are passed over, as WebDataset does. A link, which
    WebDataset passes over too, has None for its bytes. With `together` false a key may come back later, once more with
    each run of its members.

    Raises:
        UserError: devices, hostile names and sizes, a key whose members do not stand together, a truncated one.
    """
    key: str | None = None
    parts: list[Part] = []
    seen: set[str] = set()
    start = end = 0
    try:
        length = file.seek(0, io.SEEK_END)
        file.seek(0)
        # names and values that are not UTF-8 are kept: only in names it matters
        tar = tarfile.open(fileobj=file, mode="r:", tarinfo=_Header, encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
        after = 0
        while (info := tar.next()) is not None:
            begin, after = after, tar.offset  # where its headers begin: `info.offset` leaves out a global one
            end = info.offset_data + -(-info.size // 512) * 512 if info.isreg() else tar.offset
            if tar.pax_headers.keys() & {"path", "size"}:  # a range from the middle would not see it
                raise UserError(f"{where}: a global header sets the name or the size of all members", hint=COPY_AGAIN)
            sparse = info.issparse() or any(field.startswith("GNU.sparse") for field in info.pax_headers)
            link = (info.islnk() or info.issym()) and not info.size
            if not (info.isreg() or info.isdir() or link) or sparse:
                raise UserError(f"{where}: {info.name!r} is a link or a device, or sparse; only plain files count")
            if any("\udc80" <= sign <= "\udcff" for sign in info.name):
                raise UserError(f"{where}: {info.name!r}: a member's name is not UTF-8; rename it")
            if "\0" in info.name:
                raise UserError(f"{where}: {info.name!r} has a NUL in its name; rename it")
            if info.name.startswith("/") or ".." in info.name.split("/"):
                raise UserError(f"{where}: {info.name!r} leads outside of the tar")
            if info.size < 0 or (info.isreg() and info.offset_data + info.size > length):
                raise UserError(f"{where}: truncated inside {info.name!r}", hint=COPY_AGAIN)
            name = split_name(info.name) if info.isreg() or link else None
            if name is None or re.match(r"__[^/]*__($|/)", info.name):
                continue
            if info.size > MAX_MEMBER_BYTES:
                size = f"{info.size:,} bytes, more than {MAX_MEMBER_BYTES:,} are refused"
                raise UserError(f"{where}: {info.name!r} has {size}")
            if name[0] != key:
                if key is not None:
                    yield key, parts, start, begin
                if together and name[0] in seen:
                    message = f"{where}: key {name[0]!r} appears twice, or its members are not next to each other"
                    raise UserError(message, hint=f"Pack it again: {repack(where)}")
                key, parts, start = name[0], [], begin
                seen.add(key)
            content = None if link else tar.extractfile(info)
            parts.append((name[1], content.read() if content else None))
            tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has seen
    except (UserError, MemoryError):
        raise
    except Exception as error:  # tarfile raises anything on hostile headers: IndexError, RecursionError, …
        if isinstance(error, OSError):
            if is_transient(error):
                raise
        elif type(error).__module__.partition(".")[0] in _NETWORK:
            with networked(where):
                raise
        raise UserError(f"{where}: cannot be read as a tar: {first_line(error)}", hint=COPY_AGAIN) from None
    if key is not None:
        yield key, parts, start, end


def flaw(key: str, parts: Sequence[Part]) -> str | None:
    """Why a key's members make no sample; None where they make one, or one that `to_sample` refuses. See `RULE`."""
    names = [kind for kind, _ in parts]
    if len(set(names)) < len(names) or any(kind.startswith("__") for kind in names):
        return None  # WebDataset reads no such tar: `to_sample` refuses it
    links = [f"{key}.{kind}" for kind, content in parts if content is None]
    if links:
        return f"key {key!r}: {links[0]!r} is a link"
    images = [kind for kind in names if kind in IMAGES]
    if len(images) == 1:
        return None
    kinds = first_few([kind[:40] for kind in images or sorted(names)], 6)
    return f"key {key!r} needs one image ({', '.join(IMAGES)}), found {kinds}"


def to_sample(key: str, parts: Sequence[Part], where: str) -> Sample:
    """The sample that a key's members make.

    Raises:
        UserError: they make none, by `RULE`; the same extension twice, or a label that is no integer.
    """
    if why := flaw(key, parts):
        raise UserError(f"{where}: {why}; {RULE}")
    by_kind = {kind: content for kind, content in parts if content is not None}
    if len(by_kind) < len(parts):
        raise UserError(f"{where}: key {key!r} has two members of the same kind")
    if reserved := next((kind for kind in by_kind if kind.startswith("__")), None):
        raise UserError(f"{where}: key {key!r}: WebDataset keeps members called {reserved!r} for itself; rename it")
    image = next(kind for kind in by_kind if kind in IMAGES)
    label = label_of(by_kind["cls"], f"{where}: key {key!r}") if "cls" in by_kind else None
    return Sample(key=key, kind=image, image=by_kind[image], label=label, json=by_kind.get("json"))


def label_of(text: bytes, where: str) -> int:
    """The label that a `.cls` member says. Raises UserError."""
    if not re.fullmatch(rb"[0-9]{1,9}", text.strip()):
        raise UserError(f"{where}: the label is {text[:20]!r}, expected an integer from 0")
    return int(text)


def repack(url: str) -> str:
    """The command that makes a shard from a tar."""
    return call("pack", url, f"repacked/{stem_of(url)}.tar")


def counted_flaws(flaws: Sequence[str]) -> str:
    """How many keys make no sample, and why the first makes none."""
    return f"{len(flaws):,} key(s) make no sample, such as {flaws[0]}; {RULE}"


def require_whole(url: str, left_out: Sequence[str]) -> None:
    """UserError where keys of a shard make no sample (`left_out`, the flaw of each), with what leaves them out."""
    if left_out:
        more = f" ({len(left_out):,} keys make no sample)" if len(left_out) > 1 else ""
        skipping = f"{call('pack')} and {call('precompute', on_decode_error='skip')} skip and count such keys."
        raise UserError(f"{url}: {left_out[0]}{more}; {RULE}", hint=f"{skipping}\n  Pack it again: {repack(url)}")


def without_samples(urls: Sequence[str]) -> UserError:
    """The error that none of some shards has samples."""
    return UserError(f"{urls[0]}: no samples in it, nor in any other of the {len(urls)} shard(s)")


def stem_of(url: str) -> str:
    """The name of a shard's file without its ending, of letters, digits, `-` and `_` only."""
    name = url.rstrip("/").rsplit("/", 1)[-1]
    return re.sub(r"[^A-Za-z0-9_-]", "_", re.sub(r"\.tar(\.\w+)?$|\.tgz$", "", name))[:80]


@contextlib.contextmanager
def _opening(url: str) -> Iterator[None]:
    """Faults that do not pass, as UserErrors."""
    try:
        yield
    except OSError as error:
        if is_transient(error):
            raise
        raise UserError(f"{url}: cannot be opened: {first_line(error)}") from None


def open_file(url: str) -> IO[bytes]:
    """A file, local or remote, open for reading. Raises UserError."""
    with _opening(url):
        if not is_remote(url):
            return Path(url.removeprefix("file://")).open("rb")
        require_ranges(url)
        files, path = filesystem_of(url)
        with networked(url):
            return files.open(path, "rb")  # type: ignore[no-any-return]


def folder_of(url: str) -> tuple[str, str]:
    """A file's folder and its name in it."""
    folder, slash, name = url.rpartition("/")
    return folder or slash or ".", name


def size_of(url: str) -> int:
    """The length of a file in bytes. Raises UserError."""
    folder, name = folder_of(url)
    with _opening(url):
        if is_remote(url):
            require_readable(url)  # named whole
        return open_object_store(folder).size(name)


def compression(head: bytes) -> str | None:
    """What a file that begins with these 512 bytes is compressed with."""
    if head[257:262] == b"ustar":  # a plain tar, whatever its first name begins with
        return None
    return next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), None)


def closing_zeros(file: IO[bytes], end: int, url: str) -> int:
    """How many bytes stand after the last member. Raises UserError where one of them is not zero."""
    file.seek(end)
    zeros = 0
    while chunk := file.read(1 << 20):
        if chunk.strip(b"\0"):
            raise UserError(f"{url}: damaged after byte {end + zeros}: what stands there is no tar header")
        zeros += len(chunk)
    return zeros
