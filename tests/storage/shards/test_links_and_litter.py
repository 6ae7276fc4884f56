"""Links are followed as timm's reader of folders does, litter is passed over, and what stays out is counted."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import precompute.taps  # noqa: F401  # it makes timm importable
from pipeline.cli import main
from pipeline.project.init import look
from storage.errors import UserError
from storage.progress import NoProgress
from storage.shards.image_files import listing
from storage.shards.pack import pack
from storage.shards.patterns import expand
from storage.store.store import Store
from storage.store.verify import verify
from storage.testing import synthetic_shards
from student.evaluation.predict import found_in
from tests.storage.helpers import by_us, by_webdataset, class_folders, keys_in, packed, picture, samples, write_tar

LITTER = ("._1.png", ".DS_Store", ".ipynb_checkpoints/1.png", "@eaDir/1.png", "__MACOSX/1.png", "Thumbs.db")


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """32 images of two classes: 8 in a linked folder in a class, 6 linked one by one, 2 plain, 16 in a linked class."""
    aside = class_folders(tmp_path / "aside", {"more": 8, "single": 6, "whole": 16})
    folder = class_folders(tmp_path / "f", {"a": 2})
    (folder / "a" / "more").symlink_to(aside / "more", target_is_directory=True)
    for path in (aside / "single").iterdir():
        (folder / "a" / f"single-{path.name}").symlink_to(path)
    (folder / "b").symlink_to(aside / "whole", target_is_directory=True)
    return folder


def by_timm(folder: Path) -> list[str]:
    from timm.data.readers.reader_image_folder import find_images_and_targets

    return sorted(path for path, _ in find_images_and_targets(str(folder))[0])


def scattered(folder: Path, hidden: bytes = b"Mac OS X") -> None:
    """Litter in a folder."""
    for name in LITTER:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(hidden)


# ---------------------------------------------------------------------------------------------- links


def test_linked_files_and_folders_are_listed_as_timm_lists_them(linked, tmp_path) -> None:
    theirs = by_timm(linked)
    assert len(theirs) == 32
    assert [str(path) for path in listing(linked).images] == theirs
    assert [str(path) for path in found_in([linked])] == theirs
    assert look(linked, tmp_path, NoProgress()).images == 32
    made = packed(linked, tmp_path / "out")
    assert made.samples == {"train": 32}
    assert made.left_out == []
    read = by_us(*made.train)
    assert read == by_webdataset(*made.train)
    assert sorted(members["png"] for _, members in read) == sorted(Path(path).read_bytes() for path in theirs)


def test_links_that_lead_back_end_and_are_counted(linked, tmp_path) -> None:
    before = listing(linked)
    (linked / "a" / "up").symlink_to(linked, target_is_directory=True)
    (linked / "a" / "here").symlink_to(".", target_is_directory=True)
    found = listing(linked)
    assert found.images == before.images
    assert found.loops == [linked / "a" / "here", linked / "a" / "up"]
    (linked / "a" / "other").symlink_to(linked / "b", target_is_directory=True)
    (linked / "b" / "other").symlink_to(linked / "a", target_is_directory=True)  # both ways: an end after one round
    assert len(listing(linked).images) == 32 + 16 + 16
    made = packed(linked, tmp_path / "out")
    assert made.samples == {"train": 64}
    assert any("lead back to a folder" in line for line in made.left_out)


@pytest.mark.parametrize("name", ["a/lost.png", "a/lost", "lost"])
def test_links_that_lead_nowhere_are_refused_by_name(linked, tmp_path, name) -> None:
    (linked / name).symlink_to(tmp_path / "nothing")
    for take in (lambda: pack(str(linked), str(tmp_path / "x.tar")), lambda: look(linked, tmp_path, NoProgress())):
        with pytest.raises(UserError, match=rf"1 link\(s\) lead nowhere, such as .*/{name}\n  Fix or remove them"):
            take()
    assert not (tmp_path / "x.tar").exists()
    assert linked / name in found_in([linked])  # and its error is that of a file that cannot be read


def test_a_link_to_itself_leads_nowhere(linked) -> None:
    (linked / "a" / "x.png").symlink_to(linked / "a" / "x.png")
    assert listing(linked).lost == [linked / "a" / "x.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_cannot_be_read_is_refused(linked) -> None:
    (linked / "a" / "shut").mkdir(mode=0)
    with pytest.raises(UserError, match="a/shut: cannot be read: Permission denied"):
        listing(linked)


def test_pipes_are_counted_and_nobody_waits_for_them(linked, tmp_path) -> None:
    os.mkfifo(linked / "a" / "pipe.png")
    made = packed(linked, tmp_path / "out")
    assert made.left_out == [f"1 pipe(s), socket(s) or device(s), such as {linked}/a/pipe.png"]
    assert made.samples == {"train": 32}


# ---------------------------------------------------------------------------------------------- litter


def test_class_folders_with_litter_give_the_shards_that_they_give_without_it(tmp_path) -> None:
    folder = class_folders(tmp_path / "f", {"a": 3, "b": 2})
    without = packed(folder, tmp_path / "without")
    seen = look(folder, tmp_path, NoProgress())
    for place in (folder, folder / "a"):
        scattered(place, picture(99))
    made = packed(folder, tmp_path / "with")
    assert [Path(p).read_bytes() for p in made.train] == [Path(p).read_bytes() for p in without.train]
    assert made.classes == ["a", "b"]
    assert made.left_out == [f"12 hidden file(s), or what systems leave in folders, such as {folder}/.DS_Store"]
    assert look(folder, tmp_path, NoProgress()) == seen
    said: list[str] = []
    assert len(found_in([folder], said.append)) == 5
    assert said == [f"left out: {made.left_out[0]}"]


def test_files_that_are_no_images_are_counted(tmp_path) -> None:
    folder = class_folders(tmp_path / "f", {"a": 3})
    (folder / "a" / "1.gif").write_bytes(b"GIF89a")
    said: list[str] = []
    found_in([folder], said.append)
    assert said == [f"left out: 1 file(s) are no images, such as {folder}/a/1.gif"]
    assert packed(folder, tmp_path / "out").left_out == [f"1 file(s) are no images, such as {folder}/a/1.gif"]


@pytest.fixture
def littered(tmp_path: Path) -> list[str]:
    """Three shards, and beside them what macOS and Synology leave."""
    shards = synthetic_shards(tmp_path / "d", shards=3, samples=8)
    scattered(tmp_path / "d")
    (tmp_path / "d" / "._shard-000000.tar").write_bytes(b"Mac OS X")
    (tmp_path / "d" / "@eaDir" / "shard-000000.tar").write_bytes(b"Synology")
    return shards


def test_litter_beside_shards_is_none_of_them(littered, tmp_path) -> None:
    folder = tmp_path / "d"
    for pattern in (f"{folder}/*.tar", f"{tmp_path}/*/*.tar", f"{tmp_path}/[d@]*/*.tar"):
        assert expand(pattern) == littered, pattern
    with pytest.raises(UserError, match="no file matches"):
        expand(f"{folder}/._*.tar")
    made = packed(folder, tmp_path / "out")
    assert sorted(keys_in(*made.train)) == sorted(keys_in(*littered))
    assert made.left_out == [f"7 hidden file(s), or what systems leave in folders, such as {folder}/.DS_Store"]
    found = look(folder, tmp_path, NoProgress())
    assert [*found.shards, *found.val] == [os.path.relpath(path, tmp_path) for path in littered]
    with pytest.raises(UserError, match=r"Known: shard-000000\.tar, shard-000001\.tar, shard-000002\.tar"):
        expand(f"{folder}/train.tar")


def test_init_on_the_command_line_passes_over_litter(littered, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["init", "d", "--json"])
    said = capsys.readouterr()
    assert ended.value.code == 0, said.err
    assert json.loads(said.out)["images"] == 24
    assert "skipped: 7 hidden file(s)" in said.err


def test_a_shard_that_is_named_in_full_is_taken_whatever_it_is_called(tmp_path) -> None:
    path = write_tar(tmp_path / ".mine" / "x.tar", samples(2))
    assert expand(path) == expand(f"{tmp_path}/.mine/*.tar") == [path]


def test_other_files_beside_shards_are_counted(tmp_path) -> None:
    synthetic_shards(tmp_path / "d", shards=1, samples=4)
    (tmp_path / "d" / "shard-000001.tar.gz").write_bytes(b"x")
    made = packed(tmp_path / "d", tmp_path / "out")
    assert made.left_out == [f"1 other file(s) beside the shards, such as {tmp_path}/d/shard-000001.tar.gz"]


def test_litter_in_a_store_is_no_part_of_it(small) -> None:
    folder = Path(small.store.url)
    before = verify(small.store, small.shards)
    for place in (folder, folder / "banks", folder / "targets", folder / "shards", folder / "done"):
        scattered(place)
    whole = Store.open(folder)
    assert (whole.banks(), whole.targets()) == (small.store.banks(), small.store.targets())
    after = verify(whole, small.shards)
    assert (after.failures, after.notices, after.objects) == (before.failures, before.notices, before.objects)
