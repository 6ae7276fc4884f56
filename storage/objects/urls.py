"""URLs: which there are, and what goes wrong on the way to them, said once and tried again only where that may help.

A shard or a store is a local path or a URL of fsspec, alone or behind a cache of fsspec (`simplecache::https://…`).
Shards are read by ranges, so what is only a stream (`pipe:`) is none.
"""

from __future__ import annotations

import contextlib
import functools
from importlib import metadata
from typing import TYPE_CHECKING, Any

import fsspec
from fsspec.core import url_to_fs
from fsspec.registry import known_implementations

from storage.errors import UserError, did_you_mean, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator

CACHES = ("simplecache", "filecache", "blockcache", "cached")  # of fsspec: they stand before another URL
_BEGINNINGS = ("pipe:", *(f"{cache}::" for cache in CACHES))
_ARCHIVES = ("zip", "tar", "libarchive")
_READABLE = "Give a local path or a URL that can be read by ranges, such as s3://, gs:// or https://"
_PASSING = {408, 425, 429}  # of HTTP's 4xx: trying again may help


def is_remote(url: str) -> bool:
    """Whether a path is a URL and not a local path."""
    return ("://" in url and not url.startswith("file://")) or url.startswith(_BEGINNINGS)


def separate(text: str) -> list[str]:
    """The paths and URLs that `::` joins; a cache of fsspec stays with what it stands before."""
    urls, caches = [], ""
    for part in text.split("::"):
        if part in CACHES:
            caches += f"{part}::"
        else:
            urls.append(caches + part)
            caches = ""
    return [*urls, caches] if caches else urls


def require_readable(url: str) -> None:
    """Refuse at once what can never be read.

    Raises:
        UserError: `pipe:`, an unknown kind of URL, an archive in front of another URL, a package that is missing.
    """
    if url.startswith("pipe:"):
        raise UserError(f"{url}: the output of a command cannot be read by ranges", hint=_READABLE)
    for part in url.split("::"):
        protocol = part if part in CACHES else part.partition("://")[0] if "://" in part else "file"
        if problem := _problem(protocol):
            raise UserError(f"{url}: {problem[0]}", hint=problem[1])


@functools.lru_cache(maxsize=64)
def _problem(protocol: str) -> tuple[str, str] | None:
    """Why nothing can be read by a protocol, and what to do; None where it can."""
    if protocol in _ARCHIVES:
        return f"shards inside another archive ({protocol}) cannot be read", "Unpack the archive."
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        extra = "http" if protocol == "https" else protocol
        extras = metadata.metadata("fsspec").get_all("Provides-Extra") or ()
        return first_line(error), f'pip install "fsspec[{extra}]"' if extra in extras else ""
    except ValueError:
        nearest = did_you_mean(protocol, {*known_implementations, *fsspec.registry})
        return f"no kind of URL is called {protocol!r}", f"{nearest} {_READABLE}" if nearest[-1] == "?" else _READABLE
    return None


def filesystem_of(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it.

    Raises:
        UserError: as `require_readable`, or what the file system says.
    """
    require_readable(url)
    try:
        return url_to_fs(url)  # type: ignore[no-any-return]
    except Exception as error:  # each kind of file system has its own
        raise UserError(f"{url}: cannot be opened: {first_line(error)}") from None


@contextlib.contextmanager
def networked(url: str) -> Iterator[None]:
    """Faults of networks, which each kind of file system raises in its own way, as OSErrors.

    Raises:
        UserError: what no waiting mends: no credentials, a server that refuses, a package that is missing.
    """
    try:
        yield
    except FileNotFoundError as error:  # of HTTP's answers fsspec makes this one, whatever the server said
        if error.__cause__ is not None and _status(error.__cause__) not in (None, 404, 410):
            raise _network_error(url, error.__cause__) from None
        raise
    except (UserError, OSError):
        raise
    except Exception as error:
        raise _network_error(url, error) from error


def _status(error: BaseException) -> int | None:
    """The number that a web server answered with."""
    status = getattr(error, "status", None) or getattr(error, "code", None)
    return status if isinstance(status, int) else None


def _network_error(url: str, error: BaseException) -> UserError | ConnectionError:
    """A library's error as one of ours: a UserError where trying again is useless."""
    if "Credentials" in type(error).__name__:
        hint = "Give them as the service expects, for s3:// in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or ~/.aws"
        return UserError(f"{url}: no credentials for this URL: {first_line(error)}", hint=hint)
    status = _status(error)
    if status is not None and 400 <= status < 500 and status not in _PASSING:
        reason = getattr(error, "message", None) or first_line(error)
        return UserError(f"{url}: the server refuses: {status} {reason}", hint="Check the URL and the permissions.")
    if isinstance(error, ImportError | ValueError | TypeError | NotImplementedError):
        return UserError(f"{url}: cannot be read: {first_line(error, kind=True)}")
    return ConnectionError(first_line(error, kind=True))


_range_servers: set[str] = set()  # web servers that were seen to send parts of files


def require_ranges(url: str) -> None:
    """UserError where a web server sends whole files, whatever part of them is asked for."""
    server = "/".join(url.split("/")[:3])
    if "::" in url or not url.startswith(("http://", "https://")) or server in _range_servers:
        return
    files, path = filesystem_of(url)
    with networked(url), files.open(path, "rb", cache_type="none") as file:
        try:
            file.seek(1)
            part = file.read(1)
        except ValueError:  # how fsspec says that a server sends the whole file, or that it does not tell its length
            raise lacks_ranges(url) from None
    if len(part) > 1:
        raise lacks_ranges(url)
    _range_servers.add(server)


def lacks_ranges(url: str) -> UserError:
    """The error for a server that sends the whole file when a part is requested."""
    hint = f"Use a server that does, copy the file to a local disk, or let fsspec do so: simplecache::{url}"
    return UserError(f"{url}: its server does not support range requests, and shards are read in parts", hint=hint)
