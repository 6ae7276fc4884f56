"""Objects: written whole or not at all, created once, durable before anything says so; local and remote alike."""

from __future__ import annotations

import errno
import os
import pickle
import stat
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from storage.errors import DamageError, UserError
from storage.objects.object_store import LocalObjectStore, RemoteObjectStore, open_object_store, read_range
from storage.objects.urls import is_remote
from storage.testing import FaultyObjectStore

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(params=["local", "memory"])
def place(request, tmp_path):
    """A place that is empty, of either kind."""
    return open_object_store(tmp_path / "place" if request.param == "local" else f"memory://{uuid.uuid4().hex}/place")


# ---------------------------------------------------------------------------------------------- both kinds


def test_what_was_put_is_got(place):
    place.put("a/b/c", b"one")
    assert place.get("a/b/c") == b"one"
    assert place.size("a/b/c") == 3
    place.put("a/b/c", b"another")
    assert (place.get("a/b/c"), place.size("a/b/c")) == (b"another", 7)
    place.put("empty", b"")
    assert (place.get("empty"), place.size("empty")) == (b"", 0)


def test_what_is_not_there_is_not_found(place):
    for look in (place.get, place.size):
        with pytest.raises(FileNotFoundError):
            look("a/b")
    assert place.names("a") == place.walk("a") == place.names("") == place.walk("") == []


def test_an_object_is_created_once(place):
    assert place.create("done/x", b"first") is True
    assert place.create("done/x", b"second") is False
    assert place.get("done/x") == b"first"
    place.remove("done/x")
    assert place.create("done/x", b"third") is True


def test_discarding_takes_what_was_judged_and_nothing_else(place):
    place.put("done/x", b"worthless")
    place.discard("done/x", b"something else")
    assert place.get("done/x") == b"worthless"
    place.discard("done/x", b"worthless")
    assert place.names("done") == []
    place.discard("done/x", b"worthless")  # somebody was faster


def test_names_and_walk_are_sorted_and_below_the_folder(place):
    for key in ("b/2", "b/1", "a", "b/c/3", "bb/4", "B/5"):
        place.put(key, b"x")
    assert place.names("") == ["B", "a", "b", "bb"]
    assert place.names("b") == ["1", "2", "c"]
    assert place.walk("b") == ["b/1", "b/2", "b/c/3"]
    assert place.walk("") == ["B/5", "a", "b/1", "b/2", "b/c/3", "bb/4"]
    assert all(place.get(key) == b"x" for key in place.walk(""))


def test_removing_takes_an_object_or_all_that_is_below_a_folder(place):
    for key in ("b/1", "b/c/2", "bb/3", "a"):
        place.put(key, b"x")
    place.remove("b")
    assert place.walk("") == ["a", "bb/3"]
    place.remove("a")
    assert place.walk("") == ["bb/3"]
    place.remove("a")
    place.remove("nothing/here")
    assert place.walk("") == ["bb/3"]


def test_an_object_of_one_opening_is_there_for_another(place):
    place.put("a/b", b"x")
    again = pickle.loads(pickle.dumps(place))
    assert type(again) is type(place)
    assert again.url == place.url == open_object_store(place.url).url
    assert again.get("a/b") == open_object_store(place.url).get("a/b") == b"x"


def test_a_folder_is_called_as_people_call_it_and_is_the_same_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    place = LocalObjectStore("~/S")
    place.put("a", b"x")
    assert (tmp_path / "S" / "a").read_bytes() == b"x"
    assert place.url == "S"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert place.url == pickle.loads(pickle.dumps(place)).url == str(tmp_path / "S")
    assert pickle.loads(pickle.dumps(place)).get("a") == b"x"


def test_of_threads_that_race_one_creates(tmp_path):
    count, place = 8, LocalObjectStore(tmp_path)
    for turn in range(10):
        barrier = threading.Barrier(count)

        def race(number: int, turn: int = turn, barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            return place.create(f"done/{turn}", b"%d" % number)

        with ThreadPoolExecutor(count) as threads:
            won = list(threads.map(race, range(count)))
        assert won.count(True) == 1
        assert place.get(f"done/{turn}") == b"%d" % won.index(True)


@pytest.mark.parametrize("url", ["s3://b/x", "memory://x", "http://h/x"])
def test_urls_are_remote(url):
    assert is_remote(url)


@pytest.mark.parametrize("url", ["/a/b", "a", "file:///a/b", "C:/x"])
def test_paths_are_local(url):
    assert not is_remote(url)
    assert isinstance(open_object_store(url), LocalObjectStore)


def test_an_unknown_kind_of_url_is_a_clear_error():
    with pytest.raises(UserError, match="nonsense://x"):
        open_object_store("nonsense://x")


def test_ranges_of_files_are_exact(place):
    place.put("x", bytes(range(200)))
    url = f"{place.url}/x"
    for start, stop in ((0, 200), (0, 0), (5, 6), (199, 200), (64, 128)):
        assert read_range(url, start, stop) == bytes(range(start, stop))
    with pytest.raises(DamageError, match=r"x: truncated: bytes 150 to 201"):
        read_range(url, 150, 201)
    with pytest.raises(DamageError, match="truncated"):
        read_range(url, 300, 301)
    with pytest.raises(DamageError, match="nowhere: the file is missing"):
        read_range(f"{place.url}/nowhere", 0, 1)


# ---------------------------------------------------------------------------------------------- local: durable


class Recorded(LocalObjectStore):
    """Keeps what was done in order: ("write" | "link", path) and ("sync", inode)."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.done: list[tuple[str, object]] = []

    def _write(self, path: Path, data: bytes) -> None:
        self.done.append(("write", path))
        super()._write(path, data)

    def _sync(self, descriptor: int) -> None:
        super()._sync(descriptor)
        self.done.append(("sync", os.fstat(descriptor).st_ino))

    def _link(self, source: Path, target: Path) -> None:
        self.done.append(("link", target))
        super()._link(source, target)

    def at(self, path: Path) -> list[int]:
        """When a file or folder was synced."""
        return [i for i, step in enumerate(self.done) if step == ("sync", path.stat().st_ino)]


def test_everything_is_synced_before_the_link_that_says_so(tmp_path):
    place = Recorded(tmp_path / "place")
    keys = ["t/a/zarr.json", "t/a/c/0", "t/a/c/1", "t/b/c/0"]
    for key in keys:
        place.put(key, b"x")
    assert place.create("done/marker", b"marker")
    link = place.done.index(("link", place.root / "done" / "marker"))
    assert place.at(place.root / "done" / "marker")[0] < link  # its own bytes
    files = [place.root / key for key in keys]
    folders = {folder for file in files for folder in file.parents if tmp_path <= folder != file}
    assert {tmp_path, place.root, place.root / "t" / "a" / "c"} <= folders
    for path in [*files, *folders]:
        assert any(at < link for at in place.at(path)), path
    assert any(at > link for at in place.at(place.root / "done"))  # the marker's entry in its folder


def test_a_folder_that_was_written_to_while_others_are_synced_is_synced_by_the_next_marker(tmp_path):
    class Busy(Recorded):
        """Another thread puts an object while the first folder is synced."""

        def _sync(self, descriptor: int) -> None:
            super()._sync(descriptor)
            if stat.S_ISDIR(os.fstat(descriptor).st_mode) and not (self.root / "late").exists():
                (self.root / "late").mkdir()
                other = threading.Thread(target=self.put, args=("late/x", b"x"))
                other.start()
                other.join()

    place = Busy(tmp_path)
    place.put("early/x", b"x")
    place.create("done/1", b"")
    place.create("done/2", b"")
    link = place.done.index(("link", tmp_path / "done" / "2"))
    assert any(at < link for at in place.at(tmp_path / "late"))


def test_a_folder_whose_sync_failed_is_synced_by_the_next_marker(tmp_path):
    class Failing(Recorded):
        failed = False

        def _sync(self, descriptor: int) -> None:
            if not self.failed and os.fstat(descriptor).st_ino == (self.root / "a").stat().st_ino:
                self.failed = True
                raise OSError(errno.EIO, "once")
            super()._sync(descriptor)

    place = Failing(tmp_path)
    place.put("a/x", b"")
    with pytest.raises(OSError, match="once"):
        place.create("done/1", b"")
    assert place.create("done/2", b"")
    assert any(at < place.done.index(("link", tmp_path / "done" / "2")) for at in place.at(tmp_path / "a"))


def test_folders_that_are_synced_are_not_synced_again(tmp_path):
    place = Recorded(tmp_path)
    place.put("a/x", b"")
    place.create("done/1", b"")
    before = len(place.at(tmp_path / "a"))
    place.create("done/2", b"")
    assert len(place.at(tmp_path / "a")) == before
    place.put("a/y", b"")
    place.create("done/3", b"")
    assert len(place.at(tmp_path / "a")) == before + 1


def test_what_is_still_being_written_is_never_listed(tmp_path):
    seen = []

    class Looking(LocalObjectStore):
        def _write(self, path: Path, data: bytes) -> None:
            super()._write(path, data)
            seen.append((self.names("a"), self.walk(""), [p.name for p in path.parent.iterdir()]))

    place = Looking(tmp_path)
    place.put("a/x", b"1")
    place.create("a/y", b"2")
    assert [names for names, _, _ in seen] == [[], ["x"]]
    assert [walked for _, walked, _ in seen] == [[], ["a/x"]]
    assert all(any(name.endswith(".part") for name in there) for _, _, there in seen)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["x", "y"]


def test_what_a_killed_writer_left_is_not_listed(tmp_path):
    place = LocalObjectStore(tmp_path)
    place.put("a/x", b"1")
    (tmp_path / "a" / f".{uuid.uuid4().hex}.part").write_bytes(b"half")
    assert place.names("a") == ["x"]
    assert place.walk("") == place.walk("a") == ["a/x"]


def test_opening_creates_nothing(tmp_path):
    place = LocalObjectStore(tmp_path / "a" / "b")
    assert place.names("") == []
    place.remove("x")
    assert list(tmp_path.iterdir()) == []


def test_remote_objects_close_the_url(tmp_path):
    assert RemoteObjectStore("memory://a/b/").url == "memory://a/b"


# ---------------------------------------------------------------------------------------------- faults


def parts(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*.part")]


@pytest.mark.parametrize("operation", ["write", "sync"])
@pytest.mark.parametrize("fault", ["EIO", "ENOSPC", "short", "lost"])
def test_a_put_that_fails_leaves_what_was_there(tmp_path, operation, fault):
    LocalObjectStore(tmp_path).put("a/x", b"before")
    place = FaultyObjectStore(tmp_path, operation, fail_at=0, fault=fault)
    with pytest.raises(OSError, match=r"\[Errno") as error:
        place.put("a/x", b"after it")
    assert error.value.errno == (errno.ENOSPC if fault == "ENOSPC" else errno.EIO)
    assert place.get("a/x") == b"before"
    assert place.walk("") == ["a/x"]
    assert not parts(tmp_path)
    place.put("a/x", b"after it")
    assert place.get("a/x") == b"after it"


@pytest.mark.parametrize("operation", ["write", "sync", "link"])
@pytest.mark.parametrize("fault", ["EIO", "ENOSPC", "short"])
def test_a_create_that_fails_creates_nothing(tmp_path, operation, fault):
    place = FaultyObjectStore(tmp_path, operation, fail_at=0, fault=fault)
    with pytest.raises(OSError, match=r"\[Errno"):
        place.create("done/x", b"marker")
    assert place.walk("") == []
    assert not parts(tmp_path)
    assert place.create("done/x", b"marker")


def test_every_sync_of_a_create_counts(tmp_path):
    counted = FaultyObjectStore(tmp_path / "count", "sync")
    counted.put("a/x", b"")
    counted.create("done/x", b"marker")
    assert counted.calls >= 4
    for number in range(counted.calls):
        place = FaultyObjectStore(tmp_path / str(number), "sync", fail_at=number)

        def write(place: FaultyObjectStore = place) -> None:
            place.put("a/x", b"")
            place.create("done/x", b"marker")

        with pytest.raises(OSError, match=r"\[Errno"):
            write()
        assert place.calls > number
        assert place.create("done/x", b"again") or place.get("done/x") == b"marker"


def test_a_link_that_was_made_though_it_says_it_failed_is_found(tmp_path):
    place = FaultyObjectStore(tmp_path, "link", fail_at=0, fault="lost")
    with pytest.raises(OSError, match=r"\[Errno"):
        place.create("done/x", b"marker")
    assert place.get("done/x") == b"marker"
    assert place.create("done/x", b"other") is False


def test_faults_come_where_they_are_asked_for(tmp_path):
    place = FaultyObjectStore(tmp_path, "write", fail_at=2)
    counted = FaultyObjectStore(tmp_path, "write")
    for number in range(5):
        counted.put(f"c{number}", b"x")
        if number == 2:
            with pytest.raises(OSError, match=r"\[Errno"):
                place.put(f"{number}", b"x")
        else:
            place.put(f"{number}", b"x")
    assert place.calls == counted.calls == 5
    assert [key for key in place.walk("") if key[0] != "c"] == ["0", "1", "3", "4"]


def test_faults_may_last_forever(tmp_path):
    place = FaultyObjectStore(tmp_path, "read", fail_at=1, forever=True)
    place.put("x", b"x")
    assert place.get("x") == b"x"
    for _ in range(3):
        with pytest.raises(OSError, match=r"\[Errno"):
            place.get("x")


def test_a_short_write_leaves_half_where_nobody_looks(tmp_path):
    half = []

    class Watched(FaultyObjectStore):
        def _write(self, path: Path, data: bytes) -> None:
            try:
                super()._write(path, data)
            finally:
                half.append(path.read_bytes())

    with pytest.raises(OSError, match=r"\[Errno"):
        Watched(tmp_path, "write", 0, "short").put("x", b"12345678")
    assert half == [b"1234"]
