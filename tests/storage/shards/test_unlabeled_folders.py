"""Folders without classes: their images are packed without labels, wherever they lie, and it is said in one line."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from pipeline.messages import as_flags
from storage.errors import UserError
from storage.shards.pack import pack
from storage.shards.patterns import expand
from tests.storage.helpers import by_us, by_webdataset, class_folders, command_in, labels_in, picture


def pictures(folder: Path, *names: str) -> Path:
    """A folder with an image of each name."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(number))
    return folder


FLAT = ("1.png", "2.png", "IMG 3.PNG")
DATES = ("2023/01/1.png", "2023/02/1.png", "2023/02/a/b/1.png")
LOOSE = ("1.png", "cats/1.png", "cats/2.png")


@pytest.mark.parametrize(
    ("names", "empty", "why"),
    [
        (FLAT, (), "no class folders, so 3 image(s) have no labels"),
        (FLAT, ("raw", "edited"), "no class folders, so 3 image(s) have no labels"),
        (
            DATES,
            (),
            "one folder alone (2023) is not a class, so 3 image(s) have no labels; if the 2 folders in it are classes, "
            "give {folder}/2023",
        ),
        (LOOSE, (), "one folder alone (cats) is not a class, so 3 image(s) have no labels"),
    ],
    ids=["flat", "beside empty folders", "by date", "one folder and loose ones"],
)
def test_without_two_class_folders_all_images_are_packed_without_labels(tmp_path, names, empty, why) -> None:
    folder = pictures(tmp_path / "photos", *names)
    for name in empty:
        (folder / name).mkdir()
    said: list[str] = []
    made = pack(str(folder), str(tmp_path / "out" / "x-000000.tar"), say=said.append)
    assert said.count(f"{folder}: {why.format(folder=folder)}") == 1
    assert sum("label" in line for line in said) == 1
    assert (made.classes, made.left_out, made.samples) == (None, [], {"train": 3})
    assert by_us(*made.train) == by_webdataset(*made.train)
    assert {members["png"] for _, members in by_us(*made.train)} == {picture(number) for number in range(3)}
    assert labels_in(*made.train) == {None: 3}
    assert not (tmp_path / "out" / "classes.json").exists()


def test_a_folder_gives_the_shards_that_a_list_of_its_paths_gives(tmp_path) -> None:
    folder = pictures(tmp_path / "photos", *LOOSE)
    (folder / "list.csv").write_text("path\n" + "".join(f"{name}\n" for name in LOOSE))
    of_list, of_folder = (
        pack(str(source), str(tmp_path / name / "x.tar"), val_fraction=0.4)
        for source, name in ((folder / "list.csv", "a"), (folder, "b"))
    )
    assert of_folder.samples == {"train": 2, "val": 1}
    for ours, theirs in zip([*of_folder.train, *of_folder.val], [*of_list.train, *of_list.val], strict=True):
        assert Path(ours).read_bytes() == Path(theirs).read_bytes()
    assert of_folder.left_out == [f"1 file(s) are no images, such as {folder}/list.csv"]


def test_beside_class_folders_loose_images_are_skipped_and_counted(tmp_path) -> None:
    folder = pictures(tmp_path / "photos", "1.png", "2.png", "cats/1.png", "dogs/1.png")
    (folder / "notes.txt").write_text("no image")
    made = pack(str(folder), str(tmp_path / "x.tar"))
    assert made.classes == ["cats", "dogs"]
    assert labels_in(*made.train) == {0: 1, 1: 1}
    assert made.left_out == [
        f"2 image(s) are in no class folder, such as {folder}/1.png",
        f"1 file(s) are no images, such as {folder}/notes.txt",
    ]


def test_one_image_alone_is_packed_but_not_parted(tmp_path) -> None:
    folder = pictures(tmp_path / "photos", "1.png")
    assert pack(str(folder), str(tmp_path / "x.tar")).samples == {"train": 1}
    with pytest.raises(UserError, match=r"`val_fraction=0\.1`: there is only one sample, so none can be held out"):
        pack(str(folder), str(tmp_path / "y.tar"), val_fraction=0.1)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "photos: no images found\n  Give images, in one folder per class if they have classes; or shards."),
        (("1.heic", "2.heic"), "photos: no images found\n  1.heic is not one of jpg, jpeg, png, webp; convert it."),
        (("train/1.png", "val/1.png"), "photos: train, val are parts of a data set, not classes"),
        (("1.png", "cats/1.png", "dogs/1.heic"), "photos/dogs: a class folder without images\n  1.heic is not one of"),
    ],
    ids=["empty", "other files", "parts of a data set", "an empty class beside loose images"],
)
def test_what_cannot_be_packed_says_why(tmp_path, names, message) -> None:
    (tmp_path / "photos").mkdir()
    pictures(tmp_path / "photos", *names)
    with pytest.raises(UserError) as error:
        pack(str(tmp_path / "photos"), str(tmp_path / "x.tar"))
    assert str(error.value).startswith(f"{tmp_path}/{message}")
    assert not list(tmp_path.glob("*.tar"))


def test_parts_of_a_data_set_without_classes_are_packed_by_what_the_error_says(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(pictures(tmp_path, "photos/train/1.png", "photos/train/2.png", "photos/val/1.png"))
    with pytest.raises(UserError) as error:
        pack("photos", "x.tar")
    for line, count in zip(as_flags(str(error.value)).splitlines()[2:], (2, 1), strict=True):
        assert pack(*shlex.split(line)[2:]).samples == {"train": count}


def test_a_flat_folder_in_place_of_shards_answers_with_the_command_that_packs_it(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(class_folders(tmp_path / "photos", {"cat": 20}))
    with pytest.raises(UserError) as error:
        expand("cat")
    message = as_flags(str(error.value))
    assert message.startswith("cat is a folder of 20 images; shards are tar files\n  Pack it first:\n")
    assert "no labels: for labels, pack the folder that holds one folder per class" in message
    source, out, _, fraction = command_in(message)
    assert pack(source, out, val_fraction=float(fraction)).samples == {"train": 18, "val": 2}
