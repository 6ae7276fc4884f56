"""What is packed into new shards, where it lies as files: a folder of images, or a CSV of paths and labels."""

from __future__ import annotations

import csv
import os
import re
import shlex
from pathlib import Path
from typing import IO, TYPE_CHECKING

from storage.errors import UserError, call, first_line
from storage.objects.litter import is_litter
from storage.shards.classes import classes_of
from storage.shards.hints import names_for
from storage.shards.image_files import LITTER, counted, is_image, listing, tars_in
from storage.shards.tar import IMAGES, open_file
from storage.unicode_names import normalized

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

ImageSources = list[tuple[Path, Path, int | None]]  # a file, what its key is made of, its label
Row = tuple[int, str, str | None]  # line, path and label of a row of a CSV
_EXPECTED = "Expected lines such as\n  path,label\n  cats/1.jpg,cat\n  dogs/2.jpg,dog"

_PARTS = ("train", "training", "val", "valid", "validation", "test", "testing")  # of a data set


def read_folder(folder: Path, say: Callable[[str], None]) -> tuple[ImageSources, list[str] | None, list[str]]:
    """The images in a folder, the classes, and a line about each kind of files that stays out.

    Two folders or more are classes, with the images below them at any depth. Else there are no classes, and all images
    are taken without labels, wherever they lie.

    Raises:
        UserError: no images, none in a class folder, a link that leads nowhere, or a folder that cannot be read.
    """
    names = folders_in(folder)
    require_classes_alone(folder, names)
    below = listing(folder)
    if below.lost:
        hint = f"Fix or remove them. This lists all of them: find -L {shlex.quote(str(folder))} -type l"
        raise UserError(f"{folder}: {counted('link(s) lead nowhere', below.lost)}", hint=hint)
    images = [path.relative_to(folder) for path in below.images]
    others = [path for path in below.files if not is_image(path)]
    inside = [path for path in images if len(path.parts) > 1]
    classes = names if len(names) > 1 and (inside or not images) else None
    require_images(folder, classes or (), images, others)
    labels = {name: label for label, name in enumerate(classes or ())}
    taken = images if classes is None else inside
    files: ImageSources = [(folder / path, path, labels.get(path.parts[0])) for path in taken]
    if classes is None:
        say(_without_labels(folder, names, len(images)))
    loose = [folder / path for path in images if classes and len(path.parts) == 1]
    kinds = {"image(s) are in no class folder": loose, "file(s) are no images": others}
    return files, classes, [*(counted(kind, paths) for kind, paths in kinds.items() if paths), *below.left_out()]


def require_images(folder: Path, classes: Sequence[str], images: Sequence[Path], others: Sequence[Path]) -> None:
    """Refuse a folder or a class without images, with another file there that is none. Raises UserError."""
    filled = {path.parts[0] for path in images}
    where = next((folder / name for name in classes if name not in filled), None)
    if where is None and images:
        return
    problem = "a class folder without images" if where else "no images found"
    other = next((path for path in others if path.is_relative_to(where or folder)), None)
    hint = "Remove it or fill it." if where else "Give images, in one folder per class if they have classes; or shards."
    if other:
        hint = f"{other.name} is not one of {', '.join(IMAGES)}; convert it."
    raise UserError(f"{where or folder}: {problem}", hint=hint)


def _without_labels(folder: Path, names: Sequence[str], images: int) -> str:
    """Why the images of a folder have no labels; and where its classes may be, if it holds them one folder deeper."""
    if len(names) != 1:
        return f"{folder}: no class folders, so {images:,} image(s) have no labels"
    text = f"{folder}: one folder alone ({names[0]}) is not a class, so {images:,} image(s) have no labels"
    deeper = len(folders_in(folder / names[0]))
    return f"{text}; if the {deeper} folders in it are classes, give {folder / names[0]}" if deeper > 1 else text


def shards_in(folder: Path) -> tuple[list[str], list[str]]:
    """The shards in a folder, and a line about each kind of what else lies there."""
    tars = tars_in(folder)
    others = sorted({*folder.iterdir()} - {*tars, folder / "classes.json"})
    litter = [path for path in others if is_litter(path.name)]
    plain = [path for path in others if not is_litter(path.name)]
    kinds = {"other file(s) beside the shards": plain, LITTER: litter}
    return list(map(str, tars)), [counted(kind, paths) for kind, paths in kinds.items() if paths]


def folders_in(folder: Path) -> list[str]:
    """The names of the folders in a folder, linked ones too, sorted; without litter."""
    return sorted(place.name for place in folder.iterdir() if place.is_dir() and not is_litter(place.name))


def require_classes_alone(folder: Path, names: list[str]) -> None:
    """Refuse `train` and `val` for classes. Raises UserError, with the commands that pack them one by one."""
    deeper = any(folders_in(folder / name) for name in names)
    if (deeper or len(names) > 1) and all(name.lower() in _PARTS for name in names):
        counts = {part: len(listing(folder / part).images) for part in names}
        commands = (call("pack", str(folder / part), names_for(part, count)) for part, count in counts.items())
        hint = "\n  ".join(["Pack each by itself:", *commands])
        raise UserError(f"{folder}: {', '.join(names)} are parts of a data set, not classes", hint=hint)


def read_listing(listing: Path, say: Callable[[str], None]) -> tuple[ImageSources, list[str] | None]:
    """The images that a CSV lists by paths from its own folder or absolute ones, and the classes that labels name.

    Raises:
        UserError: with the line, where it is no such list or an image is not there.
    """
    rows = _rows(listing, say)
    labels, classes = _labels(listing, rows, say)
    files: ImageSources = []
    lines: dict[str, int] = {}
    for (line, text, _), label in zip(rows, labels, strict=True):
        where, path = f"{listing}, line {line}", listing.parent / text
        if not is_image(path):
            raise UserError(f"{where}: {text[:200]!r} is not a supported image; expected one of {', '.join(IMAGES)}")
        try:
            exists = path.is_file()
        except OSError as error:
            raise UserError(f"{where}: {text[:200]!r} cannot be opened: {first_line(error)}") from None
        if not exists:
            hint = "Paths are relative to the CSV's folder, or absolute."
            raise UserError(f"{where}: there is no file {path}", hint=hint)
        within = os.path.relpath(path, listing.parent)
        if within in lines:
            raise UserError(f"{where}: {text!r} is already in line {lines[within]}; remove one of the two")
        lines[within] = line
        files.append((path, Path(*(part for part in Path(within).parts if part != "..")), label))
    return files, classes


def _rows(listing: Path, say: Callable[[str], None]) -> list[Row]:
    """The rows of a CSV; without labels where there is no such column."""
    with open_file(str(listing)) as file:
        reader = csv.reader(_lines(file, listing), strict=True, skipinitialspace=True)
        rows: list[Row] = []
        try:
            header = [name.strip().lower() for name in next(reader, [])]
            if header.count("path") != 1 or header.count("label") > 1:
                problem = f"found {','.join(header)[:200]!r}" if reader.line_num else "the file is empty"
                raise UserError(f"{listing}, line 1: the first line names the columns; {problem}", hint=_EXPECTED)
            for row in reader:
                where = f"{listing}, line {reader.line_num}"
                if not "".join(row).strip() and len(row) < 2:
                    continue  # an empty line
                if len(row) > len(header):
                    hint = 'Put a path or a label with a comma in quotes: "…"'
                    raise UserError(f"{where}: {len(row)} fields, but the header names {len(header)}", hint=hint)
                fields = dict(zip(header, row, strict=False))
                label = fields.get("label", "").strip() if "label" in header else None
                if not fields.get("path"):
                    raise UserError(f"{where}: no path in it; give one or remove the line")
                if label == "":
                    raise UserError(f"{where}: no label in it; label every row, or leave the column out")
                rows.append((reader.line_num, fields["path"], label))
        except csv.Error as error:
            where = f"{listing}, line {reader.line_num}"
            raise UserError(f"{where}: not CSV: {first_line(error)}", hint=_EXPECTED) from None
    if not rows:
        raise UserError(f"{listing}: no images in it", hint=_EXPECTED)
    if others := [name for name in header if name not in ("path", "label")]:
        say(f"{listing}: other columns are not packed: {', '.join(others)}")
    if "label" not in header:
        say(f"{listing}: no column is called label, so the shards have no labels")
    return rows


def _lines(file: IO[bytes], listing: Path) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if b"\0" in line:
            raise UserError(f"{listing}, line {number}: a NUL byte in it; save the list as UTF-8 text")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{listing}, line {number}: not UTF-8 ({error.reason}); save the list as UTF-8") from None


def _labels(listing: Path, rows: list[Row], say: Callable[[str], None]) -> tuple[list[int | None], list[str] | None]:
    """The number of each row's label, and the names of all labels.

    The names are those of `classes.json` beside the CSV; without it the sorted labels, where they are not the numbers
    0 to K−1 themselves.
    """
    labels = [normalized(label) for _, _, label in rows if label is not None]  # all have one, or none
    if not labels:
        return [None] * len(rows), None
    texts = set(labels)
    known = classes_of([str(listing)])
    places = {name: i for i, name in enumerate(known or sorted(texts))}
    integers = all(re.fullmatch(r"0|[1-9][0-9]{0,8}", text) for text in texts)
    as_numbers = sorted(texts) if integers and known else []
    if ambiguous := next((text for text in as_numbers if places.get(text, int(text)) != int(text)), None):
        meanings = f"the number of a class, or the name of class {places[ambiguous]} in the classes.json beside it"
        raise UserError(f"{listing}: label {ambiguous} may be {meanings}", hint="Give names that are not numbers.")
    numbers = {str(i): i for i in range(len(places))}
    if integers and (known or texts == numbers.keys()):
        places = numbers
    elif all(re.fullmatch(r"[+-]?[0-9]+", text) for text in texts) and not known:
        say(f"{listing}: its labels are numbers, but not 0 to {len(texts) - 1}: they count as names, see classes.json")
    for (line, _, _), label in zip(rows, labels, strict=True):
        if label not in places:
            where = f"the classes.json beside the CSV, which has {len(places)} classes"
            raise UserError(f"{listing}, line {line}: label {label!r} is not in {where}; correct one of the two")
    return [places[label] for label in labels], known or list(places)
