"""Records that carry a right digest and make no sense: each is refused by name, before anything is made of it."""

from __future__ import annotations

import copy
import json
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pipeline.inspection.store import inspect
from storage.errors import UserError
from storage.objects import json_record
from storage.store.banks import bank_policy
from storage.store.store import Store
from storage.store.verify import verify
from tests.conftest import World, run_precompute, teacher_of
from tests.storage.store.test_damage import train_reads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

Path_ = tuple[str | int, ...]  # where something is in a record
GONE = object()
# Below these names may be anything: it is kept for people, or by zarr, and nothing here reads it.
FREE = {"attributes", "dimension_names", "fill_value", "made", "session", "digest", "arguments"}
# What older stores lack, or have where it says something.
OPTIONAL = {
    "values",
    "codec_errors",
    "f16",
    "f32",
    "u8",
    "u4",
    "log8",
    "kl",
    "loss_error",
    "gradient_cosine",
    "stages",
    "scales",
    "heads",
    "prefix",
    "separator",
    "configuration",
    "endian",
    "storage_transformers",
    "pillow",
    "libjpeg",
    "libjpeg_turbo",
    "zlib",
    "webp",
}
SIZES = {
    "shape",
    "chunk_shape",
    "samples",
    "size",
    "layers",
    "grid",
    "sample_shape",
    "maps",
    "output",
    "input size",
    "starts",
    "labels",
    "channels",
    "side",
    "stage",
    "heads",
    "block",
}


@pytest.fixture(scope="module")
def copied(world: World, tmp_path_factory) -> Path:
    return world.copy(tmp_path_factory.mktemp("signed") / "store")


def kinds(store: Path, world: World) -> dict[str, Path]:
    """One record of each kind."""
    u8 = world.targets["activations u8"]
    patterns = {
        "bank": "banks/*/manifest.json",
        "CNN": "teachers/cnn/manifest.json",
        "ViT": "teachers/vit/manifest.json",
        "target": f"targets/{u8}/manifest.json",
        "class row": "targets/*class_row*/manifest.json",
        "keys": f"targets/{world.targets['k']}/manifest.json",
        "index": "shards/*.json",
        "bank's marker": "done/bank.*.0.json",
        "target's marker": f"done/target.{u8}.*.0.json",
    }
    return {kind: min(store.glob(pattern)) for kind, pattern in patterns.items()}


def fields(content: Any, at: Path_ = ()) -> Iterator[Path_]:
    """Every place in a record; of a list the first two entries."""
    if at:
        yield at
    below: Any = (
        content if isinstance(content, dict) else range(min(len(content), 2)) if isinstance(content, list) else ()
    )
    for part in below:
        if part not in FREE:
            yield from fields(content[part], (*at, part))


def value_at(content: Any, at: Path_) -> Any:
    for part in at:
        content = content[part]
    return content


def changed(content: dict[str, Any], at: Path_, value: Any) -> dict[str, Any]:
    content = copy.deepcopy(content)
    holder = value_at(content, at[:-1])
    if value is GONE:
        del holder[at[-1]]
    else:
        holder[at[-1]] = value
    return content


def senseless(content: dict[str, Any], at: Path_) -> list[Any]:
    """What must not be at a place: other types, nothing, and numbers that no honest record has."""
    value = value_at(content, at)
    wrong: list[Any] = [{"x": "y"}, [["x"]]] if not isinstance(value, dict | list) else [7, "x", True]
    wrong += [None] if isinstance(value, dict | list) and at[0] != "codec_errors" else []
    wrong += [] if isinstance(value, str) or value is None else ["x"]
    wrong += ["1"] if isinstance(value, int | float) else []
    if isinstance(at[-1], str) and at[-1] not in OPTIONAL:
        wrong.append(GONE)
    if isinstance(value, int) and not isinstance(value, bool) and {*at} & SIZES:
        wrong += [-1, 10**12, 10**30, 0.5]
    return wrong


def load(store: Path) -> None:
    """Read every record."""
    opened = Store.open(store)
    for shard in opened.shard_ids():
        opened.index(shard)
    opened.teachers()
    for id in opened.banks():
        bank_policy(opened, id)
    targets = opened.targets()
    for manifest in targets.values():
        opened.teacher_of(manifest)
    for task in opened.done():
        marker = opened.marker(task)
        if task.kind == "target":
            marker.require(marker.samples, targets[task.id].codec)


@pytest.mark.parametrize(
    "kind", ["bank", "CNN", "ViT", "target", "class row", "keys", "index", "bank's marker", "target's marker"]
)
def test_every_field_of_every_record_is_held_against_its_type_and_bounds(world, copied, kind):
    path = kinds(copied, world)[kind]
    before = path.read_bytes()
    content = json.loads(before)
    unnamed, tried = [], 0
    try:
        for at in fields(content):
            for value in senseless(content, at):
                path.write_bytes(json_record.to_json(changed(content, at, value)))
                tried += 1
                try:
                    load(copied)
                    unnamed.append((at, value, "read"))
                except UserError as error:
                    if str(path.relative_to(copied)) not in str(error):
                        unnamed.append((at, value, str(error)))
    finally:
        path.write_bytes(before)
    assert tried > 50
    assert unnamed == []


# ---------------------------------------------------------------------------------------------- who reads them

EVIL: dict[str, tuple[str, Path_, Any]] = {
    "no arrays": ("target's marker", ("arrays",), GONE),
    "a list for arrays": ("target's marker", ("arrays",), [1, 2]),
    "an array that is another's": ("target's marker", ("arrays", "scale"), GONE),
    "10^12 samples": ("target's marker", ("arrays", "data_8", "metadata", "shape", 0), 10**12),
    "a chunk of 10^9": (
        "target's marker",
        ("arrays", "data_8", "metadata", "chunk_grid", "configuration", "chunk_shape", 0),
        10**9,
    ),
    "a bank's marker of 10^12": ("bank's marker", ("arrays", "parameters", "metadata", "shape", 0), 10**12),
    "an invalid sample that is not there": ("bank's marker", ("invalid",), [10**9]),
    "no view bank": ("target's marker", ("bank_views",), ["x"]),
    "samples of another shard": ("bank's marker", ("summary", "samples"), 149),
    "a target without a shape": ("target", ("sample_shape",), []),
    "a target of 10^12": ("target", ("sample_shape", 0), 10**12),
    "a target from outside of the store": ("target", ("identity", "bank"), "../../bank"),
    "an index with labels of no sample": ("index", ("labels",), []),
    "an index that ends before it begins": ("index", ("starts", 1), 10**15),
    "a bank of huge views": ("bank", ("identity", "size"), 10**9),
    "a bank of no policy": ("bank", ("identity", "line"), "rm -rf"),
}
CALLS = 3_000_000  # of functions: ten times what reading the whole store takes


@contextmanager
def few_calls() -> Iterator[None]:
    """Fail after so many calls: what is bounded is the work, whatever the machine does beside it."""
    left = CALLS

    def count(*_: object) -> None:
        nonlocal left
        left -= 1
        assert left > 0, "it works and works"

    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(None)


def verified(store: Path, world: World) -> None:
    if failures := verify(Store.open(store), world.shards, samples=4).failures:
        raise UserError("\n".join(failures))


def trained(store: Path, world: World) -> None:
    train_reads(store, world, world.targets["activations u8"])


def inspected(store: Path, world: World) -> None:
    inspect(Store.open(store))


READERS: list[Callable[[Path, World], None]] = [verified, trained, inspected]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("what", EVIL)
def test_readers_name_a_record_that_makes_no_sense_and_do_not_work_on_it(world, copied, what, reader):
    kind, at, value = EVIL[what]
    path = kinds(copied, world)[kind]
    before = path.read_bytes()
    path.write_bytes(json_record.to_json(changed(json.loads(before), at, value)))
    try:
        if what == "an array that is another's" and reader is inspected:  # it lists and decodes nothing
            reader(copied, world)
            return
        with few_calls(), pytest.raises(UserError) as error:
            reader(copied, world)
        assert str(path.relative_to(copied)) in str(error.value)
    finally:
        path.write_bytes(before)


def test_precompute_makes_again_what_a_senseless_marker_speaks_of(world, tmp_path):
    ids = {what: i for i, what in enumerate(what for what, (kind, _, _) in EVIL.items() if "marker" in kind)}
    undisturbed = Store.open(world.store).array(world.targets["activations u8"]).compute()
    for what, i in ids.items():
        store = world.copy(tmp_path / str(i))
        kind, at, value = EVIL[what]
        path = kinds(store, world)[kind]
        path.write_bytes(json_record.to_json(changed(json.loads(path.read_bytes()), at, value)))
        with few_calls():
            run_precompute(
                store,
                world.shards,
                teacher_of(world.weights, "cnn"),
                ["activations,grid=8,codec=f32", "activations,grid=8,codec=u8", "logits"],
            )
        verified(store, world)
        assert np.array_equal(Store.open(store).array(world.targets["activations u8"]).compute(), undisturbed), what


@pytest.mark.parametrize("what", [what for what, (kind, _, _) in EVIL.items() if "marker" not in kind])
def test_precompute_names_a_senseless_manifest_or_index(world, copied, what):
    kind, at, value = EVIL[what]
    path = kinds(copied, world)[kind]
    before = path.read_bytes()
    path.write_bytes(json_record.to_json(changed(json.loads(before), at, value)))
    try:
        with few_calls(), pytest.raises(UserError) as error:
            run_precompute(copied, world.shards, teacher_of(world.weights, "cnn"), ["activations,grid=8,codec=u8"])
        assert str(path.relative_to(copied)) in str(error.value)
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("left", np.nan),
        ("right", 1e300),
        ("op1", 99),
        ("op1", -1),
        ("shift_x", 1e9),
        ("erase_bottom", 1e6),
        ("erase_seed", -1),
        ("partner", 149),
        ("amount", 1000),
        ("mix", 7),
    ],
)
def test_parameters_of_views_are_held_against_their_bounds(world, tmp_path, column, value):
    from storage.store.attempts import Attempt
    from storage.store.banks import read_views, view_rows
    from storage.views.view import COLUMNS, View

    store = Store.open(world.copy(tmp_path / "store"))
    task = min(task for task in store.done() if task.kind == "bank")
    marker = store.marker(task)
    about = {name: marker.record.plain()[name] for name in ("summary", "invalid", "renderer")}
    rows = marker.arrays["parameters"].read(0, marker.samples).copy()
    assert np.array_equal(view_rows([View.of(row) for row in rows]), rows)
    rows[3, COLUMNS.index(column)] = value
    rows[3, COLUMNS.index("mix")] = value if column == "mix" else 1
    store.discard(marker)
    attempt = Attempt(store, task, marker.samples)
    attempt.array("parameters", (len(COLUMNS),), "float64", ["column"]).append(rows)
    attempt.array("signatures", (1,), "uint32", ["column"]).append(np.zeros((len(rows), 1), np.uint32))
    again = attempt.commit(about)
    with pytest.raises(UserError, match=rf"{task.name}: damaged: parameters: .* of sample 3"):
        read_views(again, 0, 10)
