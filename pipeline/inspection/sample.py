"""What a store holds of one sample: its view images as the teachers saw them, and what was kept of each.

Read by the stream's own reader, so that every image, signature, chunk and digest is compared on the way.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from storage.constants import BLOCK
from storage.errors import IdentityError, UserError
from storage.shards.classes import classes_of
from storage.shards.tar import stem_of
from storage.store.banks import bank_policy, read_views
from storage.store.markers import Task
from storage.unicode_names import normalized
from storage.views.randaugment import OPERATIONS
from storage.views.render import decode
from storage.views.view import MIXUP, Mix, View
from student.data.block_reader import BlockReader
from student.data.shuffle import Segment
from student.data.source import Source

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from PIL import Image

    from storage.shards.shard import Shard
    from storage.store.manifests import TargetManifest, TeacherManifest
    from storage.store.store import Store
    from storage.views.policy import Policy

MOST = 6  # views that are looked at
SEARCHED = 100_000  # keys among which the nearest to an unknown one are looked for


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenView:
    """One stored view of a sample.

    Attributes:
        number: of the view.
        view: its parameters.
        partner: key of the sample that it is mixed with.
        image: uint8 `[S, S, 3]`, what the teachers saw.
        stored: the image itself is in the store (`--store-views`); otherwise it was rendered again.
        values: target id -> its decoded values, f32.
    """

    number: int
    view: View
    partner: str | None
    image: np.ndarray
    stored: bool
    values: dict[str, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSample:
    """What a store holds of one sample in one bank.

    Attributes:
        key: of the sample.
        url: its shard.
        shard: id of the shard.
        label: None where the shard has none.
        name: of its class, where `classes.json` is beside the shard.
        original: its image, upright.
        bank: id of the bank.
        policy: of the bank.
        views: the first of the stored views, at most `MOST`.
        stored: how many there are.
        targets: target id -> manifest, of those that have a value of the sample.
        teachers: target id -> manifest of its teacher, as `Store.teacher_of` gives it.
        others: ids of other banks with views of it.
    """

    key: str
    url: str
    shard: str
    label: int | None
    name: str | None
    original: Image.Image
    bank: str
    policy: Policy
    views: list[SeenView]
    stored: int
    targets: dict[str, TargetManifest]
    teachers: dict[str, TeacherManifest]
    others: list[str]


def stored_sample(store: Store, urls: Sequence[str], key: str) -> StoredSample:
    """What a store holds of the sample of a key; of several banks the one with most targets of it.

    Raises:
        UserError: an unknown key, one in two shards, a sample that is marked invalid, or nothing is stored of it.
        IdentityError: no shard that the store knows, or an image or view that is not what it was.
        DamageError: an object of the store is missing or damaged.
    """
    known, done = store.shard_ids(), store.done()
    shard, position = _find_key(store, urls, known, done, key)
    banks = sorted({task.id for task in done if (task.kind, task.shard) == ("bank", shard.id)})
    if not banks:
        raise UserError(f"{store.url}: no view of {shard.id} is there; run precompute over {shard.url} first")
    begun = {task.id for task in done if (task.kind, task.shard) == ("target", shard.id)}
    manifests = {id: manifest for id, manifest in store.targets().items() if id in begun}
    count = Counter(manifest.identity.bank for manifest in manifests.values())
    bank = max(banks, key=lambda id: count[id])
    targets = {id: manifest for id, manifest in manifests.items() if manifest.identity.bank == bank}
    shown = {id: manifest for id, manifest in targets.items() if manifest.identity.tap != "pixels"}
    teachers = {id: store.teacher_of(manifest) for id, manifest in shown.items()}
    (original,) = shard.read(range(position, position + 1))
    counts = {id: store.views("target", id, [shard.id], done) for id in targets}
    stored = store.views("bank", bank, [shard.id], done)
    source = Source(shards=(shard,), policy=bank_policy(store, bank), store=store, bank=bank)
    views = []
    for number in range(min(stored, MOST)):
        complete = {id: manifest for id, manifest in targets.items() if number < counts[id]}
        views.append(_seen_view(source, position, number, complete))
    label, names = shard.index.labels[position], classes_of([shard.url])
    return StoredSample(
        key=shard.index.keys[position],
        url=shard.url,
        shard=shard.id,
        label=label,
        name=names[label] if names and label is not None and label < len(names) else None,
        original=decode(original.image),
        bank=bank,
        policy=source.policy,
        views=views,
        stored=stored,
        targets=shown,
        teachers=teachers,
        others=[id for id in banks if id != bank],
    )


def _find_key(store: Store, urls: Sequence[str], known: Sequence[str], done: set[Task], key: str) -> tuple[Shard, int]:
    """The one shard with a key, and where the key is in it; shards that precompute has not come to are passed over."""
    opened = {url: shard for url in urls if (shard := store.recognize(url, known)) is not None}
    places = _places(opened.values(), key)
    if not places:
        stems = {shard.rpartition("-")[0] for shard in {*known, *(task.shard for task in done)}}
        for url in [url for url in urls if url not in opened and stem_of(url) in stems]:
            with contextlib.suppress(IdentityError):
                opened[url] = store.require(url, known)
                places += _places([opened[url]], key)
    if len(places) > 1:
        first, second = (shard.url for shard, _ in places[:2])
        raise UserError(f"key {key!r} is in {first} and in {second}; give one of them with --shards")
    if places:
        return places[0]
    if not opened:
        store.require(urls[0], known)  # says how it differs from those of the store
    keys = list(itertools.islice(itertools.chain(*(shard.index.keys for shard in opened.values())), SEARCHED))
    alike = difflib.get_close_matches(key, keys, n=3)
    hint = f"The nearest: {', '.join(map(repr, alike))}" if alike else f"Keys there are like {keys[0]!r}"
    others = [url for url in urls if url not in opened]
    more = f" Not in the store, so not looked into: {_names(others)}; run precompute over them." if others else ""
    raise UserError(f"no sample has the key {key!r} in {len(opened)} shard(s) ({_names(list(opened))}). {hint}.{more}")


def _places(shards: Iterable[Shard], key: str) -> list[tuple[Shard, int]]:
    """Shards with a key, or with one that is the same in Unicode's NFC, and where it is in each."""
    return [(shard, i) for shard in shards if (i := _position(shard.index.keys, key)) is not None]


def _position(keys: Sequence[str], key: str) -> int | None:
    if key in keys:
        return keys.index(key)
    nfc = normalized(key)
    return None if nfc.isascii() else next((i for i, k in enumerate(keys) if normalized(k) == nfc), None)


def _names(urls: Sequence[str]) -> str:
    return ", ".join([PurePath(url).name for url in urls[:3]] + ["…"] * (len(urls) > 3))


def _seen_view(source: Source, position: int, number: int, targets: dict[str, TargetManifest]) -> SeenView:
    """View `number` of the sample at a position of the shard, with its value of each target."""
    pixels = next((id for id, manifest in targets.items() if manifest.identity.tap == "pixels"), None)
    codecs = {id: manifest.codec for id, manifest in targets.items() if id != pixels}
    reader = BlockReader(replace(source, pixels=pixels, targets=codecs))
    (shard,) = source.shards
    keys = shard.index.keys
    marker = reader.marker(Task("bank", str(source.bank), shard.id, number))
    view = read_views(marker, position, position + 1).view(position)
    if not view.valid:
        why = "precompute could not decode its image, and nothing of it is used"
        raise UserError(f"{shard.url}: key {keys[position]!r} is marked invalid: {why}")
    seen, arrays = reader.read(Segment(shard=0, block=position // BLOCK, samples=np.array([position])), number)
    return SeenView(
        number=number,
        view=view,
        partner=keys[view.mix.partner] if view.mix else None,
        image=seen["images"][0],
        stored=pixels is not None,
        values={id: codec.decode(arrays[id])[0] for id, codec in codecs.items()},
    )


def shown_box(view: View, size: int) -> tuple[float, float, float, float]:
    """The part of the original that a view of size S shows, (left, top, right, bottom) in the original's pixels."""
    left, top, right, bottom = view.box
    across, down = (right - left) / size, (bottom - top) / size
    x, y = view.shift  # the frame moved right by x: its last x columns left the image
    left, right = left + max(0, -x) * across, right - max(0, x) * across
    top, bottom = top + max(0, -y) * down, bottom - max(0, y) * down
    return left, top, right, bottom


def view_words(seen: SeenView) -> list[str]:
    """What was done to a view beside its crop, in the order in which it was done."""
    view, words = seen.view, []
    if view.shift != (0, 0):
        words.append(f"moved by {view.shift[0]}, {view.shift[1]}")
    if view.flip:
        words.append("flipped")
    for number, argument in view.operations:
        name = OPERATIONS[number][0].replace("_", " ")
        words.append(f"{name} {argument:.3g}" if argument else name)
    left, top, right, bottom = view.erased
    if right > left:
        words.append(f"erased {right - left}×{bottom - top}")
    if view.mix:
        words.append(f"{_mix_name(view.mix)}: {100 * view.mix.amount / 256:.0f} % {seen.partner}")
    return words


def _mix_name(mix: Mix) -> str:
    return "mixup" if mix.kind == MIXUP else "cutmix"


def facts(sample: StoredSample) -> dict[str, Any]:
    """The facts as plain data."""
    return {
        "key": sample.key,
        "shard": sample.shard,
        "url": sample.url,
        "label": sample.label,
        "class": sample.name,
        "original": {"width": sample.original.width, "height": sample.original.height},
        "bank": sample.bank,
        "policy": sample.policy.line,
        "size": sample.policy.size,
        "other_banks": sample.others,
        "views_stored": sample.stored,
        "views": [_view_facts(seen) for seen in sample.views],
        "targets": {
            id: {
                **{name: getattr(manifest.identity, name) for name in ("tap", "layers", "grid", "codec")},
                **{"teacher": manifest.teacher, "axes": manifest.axes, "shape": manifest.sample_shape},
            }
            for id, manifest in sample.targets.items()
        },
    }


def _view_facts(seen: SeenView) -> dict[str, Any]:
    view, mix = seen.view, seen.view.mix
    about_mix = None
    if mix:
        share = mix.amount / 256
        about_mix = {"kind": _mix_name(mix), "partner": seen.partner, "share": share, "box": list(mix.box)}
    return {
        "view": seen.number,
        "box": list(view.box),
        "shift": list(view.shift),
        "flip": view.flip,
        "operations": [[OPERATIONS[number][0], argument] for number, argument in view.operations],
        "erased": list(view.erased) if view.erased[2] > view.erased[0] else None,
        "mix": about_mix,
        "image": "stored" if seen.stored else "rendered",
        "targets": {
            id: {"min": float(values.min()), "max": float(values.max()), "mean": float(values.mean(dtype=np.float64))}
            for id, values in seen.values.items()
        },
    }


def lines(sample: StoredSample) -> list[str]:
    """The facts, human-readable."""
    label = "no label" if sample.label is None else f"label {sample.label}"
    name, size = f" ({sample.name})" if sample.name else "", f"{sample.original.width}x{sample.original.height}"
    text = [
        f"sample {sample.key} of {sample.url}: {size}, {label}{name}",
        f"bank {sample.bank}: {sample.policy.line}",
    ]
    for seen in sample.views:
        box = ", ".join(f"{edge:.5g}" for edge in seen.view.box)
        text.append(f"view {seen.number}: box {box}; {'; '.join(view_words(seen)) or 'nothing else'}")
    if more := sample.stored - len(sample.views):
        text.append(f"and {more} more view(s), not looked at")
    for id, manifest in sample.targets.items():
        text.append(f"target {id}: {'x'.join(map(str, manifest.sample_shape))}")
    if sample.others:
        text.append(f"not shown, with fewer targets of it: bank {', '.join(sample.others)}")
    return text
