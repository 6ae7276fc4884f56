"""URLs of shards: what can never be read is refused at once, by name, and caches of fsspec work."""

from __future__ import annotations

import http.server
import re
import threading
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations

from pipeline.project.schema import located
from precompute.engine.dask_runner import retry_io
from storage.errors import UserError
from storage.objects.object_store import open_object_store, read_range
from storage.shards.classes import classes_of
from storage.shards.index import build_index, read_samples
from storage.shards.patterns import expand
from storage.shards.tar import size_of
from storage.testing import synthetic_shards
from storage.views.policy import policy
from student.data.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def shards(tmp_path) -> list[str]:
    return synthetic_shards(tmp_path / "data", shards=2, samples=70, size=(16, 12))


@pytest.fixture
def in_memory(shards) -> Iterator[str]:
    """The same shards at a URL."""
    files = fsspec.filesystem("memory")
    for path in sorted(Path(shards[0]).parent.iterdir()):
        files.pipe_file(f"/tests_urls/{path.name}", path.read_bytes())
    yield "memory://tests_urls"
    files.rm("/tests_urls", recursive=True)


def refusal(call: Callable[[], object]) -> str:
    """What a call is refused with, asked as precompute asks: with patience, which must not be needed."""
    calls = 0

    def once() -> object:
        nonlocal calls
        calls += 1
        return call()

    with pytest.raises(UserError) as error:
        retry_io(once)
    assert calls == 1
    return str(error.value)


def lacking() -> str:
    """A protocol of fsspec whose package is not installed here, and that an extra of fsspec installs."""
    extras = metadata.metadata("fsspec").get_all("Provides-Extra") or ()
    for protocol in known_implementations:
        try:
            fsspec.get_filesystem_class(protocol)
        except ImportError:
            if protocol in extras:
                return str(protocol)
    pytest.skip("all packages that fsspec may use are installed")


@pytest.mark.parametrize("read", [build_index, size_of, expand, lambda url: read_range(url, 1, 2), open_object_store])
def test_what_can_never_be_read_is_refused_at_once(read):
    missing = lacking()
    for url, said in {
        f"{missing}://bucket/x.tar": f'pip install "fsspec[{missing}]"',
        f"simplecache::{missing}://bucket/x.tar": f'pip install "fsspec[{missing}]"',
        "pipe:curl https://example.org/x.tar": "the output of a command cannot be read by ranges",
        "pipe:cat x.tar": "s3://, gs:// or https://",
        "htps://example.org/x.tar": "Did you mean 'https'?",
    }.items():
        found = refusal(partial(read, url))
        assert found.startswith(url)
        assert said in found
    for url in ("zip://x.tar::memory://a.zip", "tar://x.tar"):
        assert "inside another archive" in refusal(partial(read, url))


def test_a_file_system_that_sends_whole_files_is_named():
    class Wholes(MemoryFileSystem):  # type: ignore[misc]  # fsspec has no types
        protocol = "wholes"

        def cat_file(self, path: str, start: Any = None, end: Any = None, **_: Any) -> bytes:
            return bytes(super().cat_file(path))

    fsspec.register_implementation("wholes", Wholes, clobber=True)
    Wholes().pipe_file("wholes://x.tar", bytes(10_000))
    found = refusal(lambda: read_range("wholes://x.tar", 100, 200))
    assert "does not support range requests" in found
    assert "truncated" not in found


class _Server(http.server.SimpleHTTPRequestHandler):
    """Python's own, which knows no ranges."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if "secret" in self.path:
            return self.send_error(403)
        try:
            return super().do_GET()
        except ConnectionError:  # whoever asked has seen enough
            return None


class _WithRanges(_Server):
    def do_GET(self) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not asked:
            return super().do_GET()
        data = Path(self.translate_path(self.path)).read_bytes()
        part = data[int(asked[1]) : int(asked[2]) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {asked[1]}-{int(asked[1]) + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)
        return None


@pytest.fixture
def served(shards) -> Iterator[Callable[[type], str]]:
    """Starts a server of the shards' folder; its address."""
    pytest.importorskip("aiohttp", reason="fsspec reads http:// by aiohttp")
    started = []

    def start(kind: type) -> str:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(kind, directory=str(Path(shards[0]).parent)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def test_a_web_server_without_ranges_is_named_and_works_behind_a_cache(served, shards):
    server = served(_Server)
    url = f"{server}/{Path(shards[0]).name}"
    for read in (build_index, lambda url: read_range(url, 100, 200)):
        assert refusal(partial(read, url)).startswith(f"{url}: its server does not support range requests")
    assert build_index(f"simplecache::{url}") == build_index(shards[0])
    assert "403" in refusal(lambda: read_range(f"{server}/secret.tar", 1, 2))


def test_a_web_server_with_ranges_is_read(served, shards):
    server = served(_WithRanges)
    url = f"{server}/{Path(shards[0]).name}"
    index = build_index(url)
    assert index == build_index(shards[0])
    assert read_samples(url, index, range(3, 5)) == read_samples(shards[0], index, range(3, 5))
    assert classes_of([url]) == classes_of(shards)


def test_a_cache_of_fsspec_stands_before_a_url(in_memory, shards, tmp_path):
    pattern = f"simplecache::{in_memory}/shard-{{000000..000001}}.tar"
    urls = [f"simplecache::{in_memory}/{Path(path).name}" for path in shards]
    assert expand(pattern) == urls
    assert expand(f"{shards[1]}::{pattern}") == [shards[1], *urls]
    assert located(f"x.tar::{pattern}", tmp_path) == f"{tmp_path}/x.tar::{pattern}"
    assert [build_index(url) for url in urls] == [build_index(path) for path in shards]
    assert classes_of(urls) == classes_of(shards)
    streams = [
        Stream(several, batch_size=20, lanes=5, shuffle_blocks=1, policy=policy("light", 16))
        for several in (urls, shards)
    ]
    for mine, theirs in zip(*(stream.epoch(0) for stream in streams), strict=True):
        assert np.array_equal(mine.images, theirs.images)
        assert np.array_equal(mine.labels, theirs.labels)
