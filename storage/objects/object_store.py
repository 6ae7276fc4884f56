"""Named bytes in a folder or below a URL: all reading and writing of a store goes through here.

Two implementations: `LocalObjectStore` (durable: files and folders are synced before anything is said to be written)
and `RemoteObjectStore` (any fsspec URL). `ZarrStore` lets zarr write through either. Keys are relative paths with `/`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from storage.errors import DamageError, UserError, display_path
from storage.objects.litter import is_litter
from storage.objects.urls import filesystem_of, is_remote, lacks_ranges, networked, require_ranges

if TYPE_CHECKING:
    import io
    from collections.abc import Sequence

COPY_AGAIN = "Copy or create the file again."


class LocalObjectStore:
    """Objects as files. A file is written under a temporary name, synced, and renamed or linked."""

    def __init__(self, folder: str | Path) -> None:
        self.root = Path(folder).expanduser().absolute()
        self._unsynced: set[Path] = set()
        self._syncing = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self.root),)  # whoever reads it may stand in another folder

    @property
    def url(self) -> str:
        """The folder, relative to the current one where it lies below it."""
        return display_path(self.root)

    # The four steps that can fail; the fault-injecting store of storage.testing overrides them.
    def _read(self, path: Path) -> bytes:
        return path.read_bytes()

    def _read_into(self, path: Path, buffers: Sequence[np.ndarray]) -> int:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size == sum(buffer.nbytes for buffer in buffers):
                for buffer in buffers:
                    _fill(file, buffer.data)
            return size

    def _write(self, path: Path, data: bytes) -> None:
        with path.open("xb") as file:
            file.write(data)
            file.flush()
            self._sync(file.fileno())

    def _sync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def _link(self, source: Path, target: Path) -> None:
        os.link(source, target)

    def get(self, key: str) -> bytes:
        """The bytes of an object; FileNotFoundError where there is none."""
        return self._read(self.root / key)

    def get_into(self, key: str, buffers: Sequence[np.ndarray]) -> int:
        """Fill uint8 buffers with the bytes of an object, one after another; the object's length in bytes.

        Where the length is not that of all buffers, they hold nothing of use. FileNotFoundError where there is none.
        """
        return self._read_into(self.root / key, buffers)

    def file(self, key: str) -> Path | None:
        """The file of an object; None where there is none."""
        path = self.root / key
        return path if path.is_file() else None

    def size(self, key: str) -> int:
        """The length of an object in bytes; FileNotFoundError where there is none."""
        return (self.root / key).stat().st_size

    def put(self, key: str, data: bytes) -> None:
        """Write an object whole, over what may be there."""
        path, temporary = self._temporary(key)
        try:
            self._write(temporary, data)
            temporary.replace(path)
            self._unsynced.add(path.parent)
        finally:
            temporary.unlink(missing_ok=True)

    def create(self, key: str, data: bytes) -> bool:
        """Write an object whole unless there is one; whether it was written. What was put before is durable first.

        A temporary file, sync, hard link, sync of the folder.
        """
        path, temporary = self._temporary(key)
        self._sync_folders()
        try:
            self._write(temporary, data)
            self._link(temporary, path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
            self._unsynced.add(path.parent)
            self._sync_folders()
        return True

    def _temporary(self, key: str) -> tuple[Path, Path]:
        path = self.root / key
        folder = path.parent
        while not folder.exists():  # a new folder is an entry in its parent, which must be synced too
            self._unsynced.add(folder)
            folder = folder.parent
        self._unsynced.add(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._unsynced.add(path.parent)
        return path, path.with_name(f".{uuid.uuid4().hex}.part")

    def _sync_folders(self) -> None:
        with self._syncing:  # nobody says that something is written while another thread still syncs its folder
            for folder in sorted(self._unsynced):
                self._unsynced.discard(folder)  # before: what is added while it is synced waits for the next time
                try:
                    descriptor = os.open(folder, os.O_RDONLY)
                except FileNotFoundError:
                    continue
                try:
                    self._sync(descriptor)
                except OSError:
                    self._unsynced.add(folder)
                    raise
                finally:
                    os.close(descriptor)

    def names(self, folder: str) -> list[str]:
        """The sorted names directly inside a folder, without litter: what is still being written is hidden.

        Empty where there is no such folder.
        """
        path = self.root / folder
        return sorted(p.name for p in path.iterdir() if not is_litter(p.name)) if path.is_dir() else []

    def walk(self, folder: str) -> list[str]:
        """The sorted keys of all objects below a folder."""
        keys = []
        for path, _, names in os.walk(self.root / folder):
            here = Path(path).relative_to(self.root)
            keys += [(here / name).as_posix() for name in names if not is_litter(name)]
        return sorted(keys)

    def remove(self, key: str) -> None:
        """Remove a file, or a folder with all that is in it."""
        path = self.root / key
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def discard(self, key: str, data: bytes) -> None:
        """Remove an object if it still holds these bytes: somebody may have put another in its place.

        It is taken away first, and put back if it does not.
        """
        path = self.root / key
        aside = path.with_name(f".{uuid.uuid4().hex}.part")
        try:
            path.rename(aside)
        except FileNotFoundError:
            return
        try:
            if aside.read_bytes() != data:
                with contextlib.suppress(FileExistsError):
                    os.link(aside, path)
        finally:
            aside.unlink(missing_ok=True)


class RemoteObjectStore:
    """Objects below an fsspec URL (`s3://bucket/folder`, `memory://folder`). A put is whole and durable there."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.files, root = filesystem_of(self.url)
        self.root = root.rstrip("/")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.url,)

    def _path(self, key: str) -> str:
        return f"{self.root}/{key}" if key else self.root

    def get(self, key: str) -> bytes:
        """The bytes of an object."""
        with networked(self.url):
            return bytes(self.files.cat_file(self._path(key)))

    def get_into(self, key: str, buffers: Sequence[np.ndarray]) -> int:
        """Fill uint8 buffers with the bytes of an object, one after another; the object's length in bytes."""
        data = np.frombuffer(self.get(key), np.uint8)
        stop = 0
        if len(data) == sum(buffer.nbytes for buffer in buffers):
            for buffer in buffers:
                start, stop = stop, stop + buffer.nbytes
                buffer[:] = data[start:stop]
        return len(data)

    def file(self, key: str) -> None:
        """Objects of a server lie in no file."""

    def size(self, key: str) -> int:
        """The length of an object in bytes."""
        with networked(self.url):
            size = self.files.info(self._path(key))["size"]
        if size is None:
            message = f"{self.url}/{key}: the server does not tell the length of the file"
            raise UserError(message, hint="Copy it to a local disk.")
        return int(size)

    def put(self, key: str, data: bytes) -> None:
        """Write an object whole."""
        with networked(self.url):
            self.files.pipe_file(self._path(key), data)

    def create(self, key: str, data: bytes) -> bool:
        """Write an object unless there is one (on S3 a conditional put)."""
        try:
            with networked(self.url):
                self.files.pipe_file(self._path(key), data, mode="create")
        except FileExistsError:
            return False
        return True

    def names(self, folder: str) -> list[str]:
        """The sorted names directly inside a folder, without litter."""
        self.files.invalidate_cache()
        try:
            with networked(self.url):
                paths = self.files.ls(self._path(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(name for path in paths if not is_litter(name := path.rstrip("/").rsplit("/", 1)[-1]))

    def walk(self, folder: str) -> list[str]:
        """The sorted keys of all objects below a folder."""
        self.files.invalidate_cache()
        start = len(self.files._strip_protocol(self.root)) + 1  # noqa: SLF001 - what `find` gives begins so
        with networked(self.url):
            return sorted(path[start:] for path in self.files.find(self._path(folder)))

    def remove(self, key: str) -> None:
        """Remove an object or a folder with all that is in it."""
        with contextlib.suppress(FileNotFoundError), networked(self.url):
            self.files.rm(self._path(key), recursive=True)

    def discard(self, key: str, data: bytes) -> None:
        """Remove an object if it still holds these bytes. Object stores cannot do both in one step."""
        with contextlib.suppress(FileNotFoundError):
            if self.get(key) == data:
                self.remove(key)


ObjectStore = LocalObjectStore | RemoteObjectStore  # what a store needs of the place it lies in


def _fill(file: io.FileIO, buffer: memoryview) -> None:
    """Read the next bytes of a file until a buffer is full. Raises OSError where the file ends before."""
    while buffer:
        count = file.readinto(buffer)  # at most 2 GiB at once
        if not count:
            raise OSError(errno.EIO, "the file became shorter while it was read")
        buffer = buffer[count:]


def open_object_store(url: str | Path) -> ObjectStore:
    """The objects at a local folder or an fsspec URL; nothing is created yet."""
    url = str(url)
    return RemoteObjectStore(url) if is_remote(url) else LocalObjectStore(url.removeprefix("file://"))


def read_range(url: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of one file, local or remote.

    Raises:
        DamageError: the file is gone or ends before `stop`.
        UserError: its server sends no parts of files.
    """
    try:
        if is_remote(url):
            require_ranges(url)
            files, path = filesystem_of(url)
            with networked(url):
                data = bytes(files.cat_file(path, start=start, end=stop))
        else:
            with Path(url.removeprefix("file://")).open("rb") as file:
                file.seek(start)
                data = file.read(stop - start)
    except FileNotFoundError:
        raise DamageError(f"{url}: the file is missing", hint="Put it back, or leave it out.") from None
    if len(data) > stop - start:
        raise lacks_ranges(url)
    if len(data) != stop - start:
        message = f"{url}: truncated: bytes {start} to {stop} were requested, it ends after {len(data)} of them"
        raise DamageError(message, hint=COPY_AGAIN)
    return data
