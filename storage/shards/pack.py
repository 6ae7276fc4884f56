"""Pack: a folder of images, a CSV or other shards into new shards, shuffled over everything, readable by WebDataset.

This is also how a tar that cannot be read by ranges (compressed, members apart) becomes a shard.
"""

from __future__ import annotations

import bz2
import dataclasses
import functools
import gzip
import io
import json
import lzma
import re
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from storage.errors import UserError, first_line, setting
from storage.objects.atomic import atomic_write
from storage.objects.object_store import read_range
from storage.objects.urls import is_remote
from storage.rng import generator
from storage.shards import tar
from storage.shards.classes import classes_of
from storage.shards.image_files import kind_of
from storage.shards.image_folder import ImageSources, read_folder, read_listing, shards_in
from storage.shards.patterns import braces, expand
from storage.shards.stratify import stratified_sample
from storage.unicode_names import all_normalized, normalized

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackSource:
    """Where a sample's bytes are: a file of its own, or parts of a tar."""

    key: str
    label: int | None
    load: Callable[[], dict[str, bytes]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackResult:
    """The shards that were written, how many samples each part has, and what of the source is skipped."""

    train: list[str]
    val: list[str]
    samples: dict[str, int]
    classes: list[str] | None
    left_out: list[str]  # a line with a count for each kind of it


def pack(
    source: str | Sequence[str],
    out: str,
    *,
    per_shard: int | None = None,
    val_fraction: float = 0.0,
    fraction: float = 1.0,
    seed: int = 0,
    shuffle: bool = True,
    say: Say = lambda _line: None,
) -> PackResult:
    """Write shards.

    Args:
        source: one folder of class folders or of images without labels, one CSV with the columns `path` and perhaps
            `label`, or patterns of shards (compressed ones too).
        out: the new shards' names, as `train-{000000..000009}.tar`; validation shards get `val-` before the digits.
        per_shard: samples a shard; without it they are spread evenly over all the names.
        val_fraction: the part of each class that goes to the validation shards: at least one of its samples, and
            never all of them.
        fraction: the part of each class that is kept at all, split off after the validation samples.
        seed: of the order and of both choices.
        shuffle: over everything; without it the order of the source stays.
        say: called with lines of progress.

    Raises:
        UserError: nothing to pack or to hold out, files that would be overwritten, names too few or too many.
    """
    if not 0 < fraction <= 1:
        where = setting("fraction", f"{fraction:g}")
        raise UserError("expected more than 0 and at most 1; 0.1 is a tenth", setting=where)
    val_setting = setting("val_fraction", f"{val_fraction:g}")
    if not 0 <= val_fraction < 1:
        raise UserError("expected 0 to less than 1; 0.1 is a tenth", setting=val_setting)
    if per_shard is not None and per_shard < 1:
        raise UserError("expected 1 or more", setting=setting("per_shard", per_shard))
    with tempfile.TemporaryDirectory(prefix="pack-") as scratch:
        say("looking at the source")
        left_out: list[str] = []

        def leave_out(line: str) -> None:
            left_out.append(line)
            say(f"skipped: {line}")

        patterns = [source] if isinstance(source, str) else list(source)
        sources, classes = _sources(patterns, Path(scratch), say, leave_out)
        if not sources:
            hint = "\n  ".join(f"skipped: {line}" for line in left_out)
            raise UserError("there are no samples in the source", hint=hint)
        validation, rest = _split(sources, val_fraction, seed, "val", 1) if val_fraction else ([], sources)
        if val_fraction and not validation:
            few = "there is only one sample" if len(sources) == 1 else "no class has two samples"
            message = f"{few}, so none can be held out of training"
            raise UserError(message, setting=val_setting, hint="Give more images, or leave this setting out.")
        train, _ = _split(rest, fraction, seed, "fraction", 0)
        names = braces(out)
        if len(set(names)) < len(names):
            raise UserError(f"{out}: the same shard is named twice")
        order_seed = seed if shuffle else None
        lists = {"train": _cut(train, names, per_shard, order_seed)}
        if validation:
            val_names = [re.sub(r"(\d+\.tar)$", r"val-\1", name) for name in names]
            if any(name in names for name in val_names):  # no digits at the end
                val_names = [re.sub(r"\.tar$", "-val.tar", name) for name in names]
            count = max(1, round(len(lists["train"]) * len(validation) / len(train)))
            lists["val"] = _cut(validation, val_names[:count], None, order_seed)
        shards = {name: samples for cut in lists.values() for name, samples in cut.items()}
        _refuse_overwriting(list(shards), classes)
        written: list[Path] = []
        try:
            for name, samples in shards.items():
                say(f"writing {name}: {len(samples)} samples")
                _write(name, samples)
                written.append(Path(name))
            for place in sorted({path.with_name("classes.json") for path in written}):
                if classes is not None and not place.exists():
                    written.append(place)
                    place.write_text(json.dumps(classes, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        except BaseException:  # a part of a data set would look like a whole one
            for path in written:
                path.unlink(missing_ok=True)
            raise
    counts = {part: sum(map(len, cut.values())) for part, cut in lists.items()}
    train_urls, val_urls = list(lists["train"]), list(lists.get("val", {}))
    return PackResult(train=train_urls, val=val_urls, samples=counts, classes=classes, left_out=left_out)


# ---------------------------------------------------------------------------------------------- sources


def _sources(patterns: list[str], scratch: Path, say: Say, leave_out: Say) -> tuple[list[PackSource], list[str] | None]:
    folder = Path(patterns[0]).expanduser()
    listing = next((pattern for pattern in patterns if pattern.lower().endswith(".csv")), None)
    if listing and not folder.is_dir():
        if len(patterns) > 1 or is_remote(listing):
            raise UserError(f"{listing}: a CSV is packed alone, and from a local folder")
        files, names = read_listing(folder, say)
        return _files(files), names
    if len(patterns) == 1 and folder.is_dir():
        urls, skipped = shards_in(folder)
        if not urls:
            files, classes, skipped = read_folder(folder, say)
        for line in skipped:
            leave_out(line)
        if not urls:
            return _files(files), classes
    elif len(patterns) == 1 and not folder.exists() and re.fullmatch(r"[^*?\[{:]+(?<!\.tar)", patterns[0]):
        hint = "Give a folder of images, with one folder per class if they have classes."
        raise UserError(f"{folder}: no such folder, list or shard", hint=hint)
    else:
        urls = expand(patterns)
    flaws: list[str] = []
    shards = [_tar(_uncompressed(url, scratch / f"{number}.tar"), url, flaws) for number, url in enumerate(urls)]
    if flaws:
        leave_out(tar.counted_flaws(flaws))
    sources = [(number, source) for number, shard in enumerate(shards) for source in shard]
    if len({source.key for _, source in sources}) == len(sources):
        return [source for _, source in sources], classes_of(urls)
    # shards that count their keys from zero: the shard's number makes them distinct
    return [dataclasses.replace(s, key=f"{number:06d}_{s.key}") for number, s in sources], classes_of(urls)


def _files(files: ImageSources) -> list[PackSource]:
    """The sources that (file, what its key is made of, label) are."""
    sources: dict[str, PackSource] = {}
    for path, name, label in files:
        plain = key = re.sub(r"[^\w-]", "_", name.with_suffix("").as_posix())
        number = 1
        while key in sources:  # a.b.jpg and a_b.jpg, or a.jpg and a.png, would share a key
            number += 1
            key = f"{plain}-{number}"
        sources[key] = PackSource(key=key, label=label, load=functools.partial(_load_file, path, label))
    return list(sources.values())


def _load_file(path: Path, label: int | None) -> dict[str, bytes]:
    try:
        image = {kind_of(path): path.read_bytes()}
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from None
    return image if label is None else {**image, "cls": str(label).encode()}


def _uncompressed(url: str, scratch: Path) -> str:
    """The url itself, or a plain copy of a compressed tar."""
    openers: dict[str, Callable[[IO[bytes]], Any]] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
    with tar.open_file(url) as file:
        kind = tar.compression(file.read(512))
        if kind is None:
            return url
        file.seek(0)
        if kind not in openers:
            raise UserError(f"{url}: compressed with {kind}", hint=f"Decompress it first: {kind} -d {url}")
        most = (64 << 20) + 100 * tar.size_of(url)  # images hardly get smaller: more than this only fills the disk
        try:
            with openers[kind](file) as plain, scratch.open("wb") as copy:
                while chunk := plain.read(1 << 20):
                    copy.write(chunk)
                    if copy.tell() > most:
                        raise UserError(f"{url}: more than {most:,} bytes once decompressed; decompress it yourself")
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise UserError(f"{url}: cannot be decompressed: {first_line(error)}") from None
    return str(scratch)


def _tar(path: str, url: str, flaws: list[str]) -> list[PackSource]:
    """The samples of a plain tar, whatever the order of their members is; `flaws` gets a word on each key without."""
    runs: dict[str, list[tuple[int, int]]] = defaultdict(list)
    members: dict[str, list[tar.Part]] = defaultdict(list)
    with tar.open_file(path) as file:
        stop = 0
        for key, parts, start, stop in tar.iter_samples(file, url, together=False):
            runs[key].append((start, stop))
            # of the bytes only the label's are kept: a tar may be larger than the memory
            members[key] += [(kind, data and (data.strip()[:20] if kind == "cls" else b"")) for kind, data in parts]
        if runs:
            tar.closing_zeros(file, stop, url)  # nothing else may follow: tarfile ends at the first damaged header
    sources = []
    for key, parts in members.items():
        if why := tar.flaw(key, parts):
            flaws.append(f"{url}: {why}")
            continue
        for kind, _ in parts:
            if not kind or kind.startswith("_"):
                raise UserError(f"{url}: key {key!r}: WebDataset writes no member called {kind!r}; rename it")
        labels = [tar.label_of(text or b"", f"{url}: key {key!r}") for kind, text in parts if kind == "cls"]
        label = labels[-1] if labels else None
        sources.append(PackSource(key=key, label=label, load=functools.partial(_load_runs, path, url, key, runs[key])))
    return sources


def _load_runs(path: str, url: str, key: str, runs: list[tuple[int, int]]) -> dict[str, bytes]:
    loaded: list[tar.Part] = []
    for start, stop in runs:
        for _, parts, _, _ in tar.iter_samples(io.BytesIO(read_range(path, start, stop)), url, together=False):
            loaded += parts
    tar.to_sample(key, loaded, url)  # one image, no member twice, a label that is one
    return {kind: content for kind, content in loaded if content is not None}


# ---------------------------------------------------------------------------------------------- what goes where


def _split(
    sources: list[PackSource], fraction: float, seed: int, what: str, rest: int
) -> tuple[list[PackSource], list[PackSource]]:
    """A class-balanced part of the samples and the rest, both in their former order.

    At least one of each class is in the part, but at least `rest` (0 or 1) of each are in the rest.
    """
    chosen = stratified_sample([source.label for source in sources], fraction, seed, what, rest)
    return [s for i, s in enumerate(sources) if i in chosen], [s for i, s in enumerate(sources) if i not in chosen]


def _cut(
    sources: list[PackSource], names: list[str], per_shard: int | None, seed: int | None
) -> dict[str, list[PackSource]]:
    """Name of each shard -> its samples."""
    if seed is not None:
        sources = [sources[int(i)] for i in generator("pack", "order", seed).permutation(len(sources))]
    total = len(sources)
    count = len(names) if per_shard is None else -(-total // per_shard)
    if count > len(names):
        message = f"{total} samples at {per_shard} a shard make {count} shards, {names[0]} … gives {len(names)} name(s)"
        raise UserError(message, hint=f"Widen the braces, or give a larger {setting('per_shard', 'N')}")
    if count > total:
        hint = "Give fewer names in the braces."
        raise UserError(f"{total} samples cannot fill {count} shards", hint=hint)
    bounds = [total * i // count if per_shard is None else min(i * per_shard, total) for i in range(count + 1)]
    return {name: sources[a:b] for name, a, b in zip(names, bounds, bounds[1:], strict=False)}


def _refuse_overwriting(names: list[str], classes: list[str] | None) -> None:
    for name in names:
        if is_remote(name):
            raise UserError(f"{name}: shards are written to a local folder; copy them from there")
        if not name.endswith(".tar") or "*" in name:
            pattern = "'train-{000000..000009}.tar'"
            raise UserError(f"{name}: new shards are called NAME.tar, several by braces: {pattern}")
        if Path(name).exists():
            hint = "Give other names, or remove it."
            raise UserError(f"{name}: already exists; shards are never overwritten", hint=hint)
    for folder in {Path(name).parent for name in names}:
        listed = classes_of([str(folder / "x.tar")])
        if listed is not None and (classes is None or listed != all_normalized(classes)):
            hint = f"Put the new shards in a folder of their own, such as new/{Path(names[0]).name}"
            raise UserError(f"{folder}/classes.json: already exists with other classes, of other shards", hint=hint)
    seen: dict[str, str] = {}
    for name in classes or []:
        if (other := seen.setdefault(normalized(name), name)) != name:
            message = f"classes {other!a} and {name!a}: the same name in different Unicode forms (NFC and NFD)"
            raise UserError(message, hint="Make them one class, or rename one.")
        if any("\ud800" <= sign <= "\udfff" for sign in name):  # how Python keeps bytes that are not UTF-8
            raise UserError(f"class {name!r}: its name is not UTF-8; rename it")


def _write(name: str, sources: list[PackSource]) -> None:
    import webdataset

    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary, webdataset.TarWriter(str(temporary), mtime=0) as writer:
        for source in sources:
            writer.write({"__key__": source.key, **source.load()})
