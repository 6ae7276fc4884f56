"""Contract 4: a deleted, emptied, truncated, swapped or flipped object is an error that names it. Never zeros."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from storage.errors import UserError
from storage.store.store import Store
from storage.store.verify import verify
from student.data.stream import Stream
from student.settings import BankChoice
from student.targets.requirement import TargetRequirement
from student.targets.select import select_targets

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import World

FLIPS = 200


def objects(store: Path) -> list[Path]:
    """Everything but the card, which is for people."""
    return sorted(p for p in store.rglob("*") if p.is_file() and p.name != "README.md")


def read_in_training(store: Path, world: World, target: str) -> list[Path]:
    """The objects that a run over this target reads."""
    bank = Store.open(store).target(target).identity.bank
    found = [store / "zarr.json", store / f"banks/{bank}/manifest.json", *(store / "targets").glob("*/manifest.json")]
    found += [
        *(store / "shards").iterdir(),
        *(store / "done").glob(f"*.{target}.*"),
        *(store / "done").glob(f"*.{bank}.*"),
    ]
    found += [*(store / "targets" / target).glob("*/*/*/*/c/**/*"), *(store / "banks" / bank).glob("*/*/*/*/c/**/*")]
    return sorted(p for p in found if p.is_file())


def failures(store: Path) -> list[str]:
    try:
        return verify(Store.open(store)).failures
    except UserError as error:
        return [str(error)]


def train_reads(store: Path, world: World, target: str) -> None:
    """What training does before and while it reads: choose, open, and go through both views of everything."""
    opened = Store.open(store)
    known = opened.shard_ids()
    ids = [opened.require(url, known).id for url in world.shards]
    select_targets(
        opened,
        ids,
        [TargetRequirement(loss="aal", taps=(("logits" if "logits" in target else "activations",),), target=target)],
        BankChoice(),
    )
    stream = Stream(world.shards, batch_size=20, lanes=5, shuffle_blocks=1, store=opened, targets=[target])
    for epoch in range(stream.views or 0):
        for _ in stream.epoch(epoch):
            pass


@pytest.fixture(scope="module")
def copy(world: World, tmp_path_factory) -> Path:
    return world.copy(tmp_path_factory.mktemp("damage") / "store")


def test_an_undamaged_store_has_nothing_to_say(world, copy):
    report = verify(Store.open(copy), world.shards, samples=0)
    assert report.failures == []
    assert report.notices == []
    assert report.views_rendered == 2 * 300
    train_reads(copy, world, world.targets["logits"])


def test_of_200_flipped_bits_verify_misses_none(copy):
    rng = random.Random(0)
    everything = objects(copy)
    missed = []
    for _ in range(FLIPS):
        path = rng.choice(everything)
        before = path.read_bytes()
        data = bytearray(before)
        at = rng.randrange(len(data))
        data[at] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        if not any(str(path.relative_to(copy)) in failure for failure in failures(copy)):
            missed.append((path, at))
        path.write_bytes(before)
    assert missed == []
    assert failures(copy) == []


def test_flipped_bits_in_what_training_reads_stop_it(world, copy):
    rng = random.Random(1)
    target = world.targets["logits"]
    everything = read_in_training(copy, world, target)
    assert {p.suffix for p in everything} == {".json", ""}
    for _ in range(40):
        path = rng.choice(everything)
        before = path.read_bytes()
        data = bytearray(before)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        with pytest.raises(UserError) as error:
            train_reads(copy, world, target)
        assert str(path.relative_to(copy)) in str(error.value)
        path.write_bytes(before)


def delete(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def kinds(store: Path) -> dict[str, Path]:
    """One object of each kind."""
    first: Callable[[str], Path] = lambda pattern: next(p for p in sorted(store.glob(pattern)) if p.is_file())  # noqa: E731
    return {
        "root": store / "zarr.json",
        "index": first("shards/*.json"),
        "bank manifest": first("banks/*/manifest.json"),
        "target manifest": first("targets/*/manifest.json"),
        "teacher manifest": first("teachers/*/manifest.json"),
        "graph": first("teachers/*/graphs/*.onnx"),
        "bank marker": first("done/bank.*"),
        "target marker": first("done/target.*logits*"),
        "array metadata": first("targets/*/*/*/*/*/zarr.json"),
        "target chunk": first("targets/*logits*/*/*/*/*/c/**/0"),
        "parameters chunk": first("banks/*/*/*/*/parameters/c/**/0"),
        "signatures chunk": first("banks/*/*/*/*/signatures/c/**/0"),
    }


@pytest.mark.parametrize("harm", [delete, empty, truncate, lengthen])
def test_every_kind_of_object_is_missed_when_it_is_harmed(world, copy, harm):
    target = world.targets["logits"]
    in_training = read_in_training(copy, world, target)
    for kind, path in kinds(copy).items():
        before = path.read_bytes()
        harm(path)
        name = str(path.relative_to(copy))
        assert any(name in failure for failure in failures(copy)), kind
        if path in in_training:
            with pytest.raises(UserError) as error:
                train_reads(copy, world, target)
            assert name in str(error.value), kind
        path.write_bytes(before)
    assert failures(copy) == []


def swap(a: Path, b: Path) -> None:
    a_bytes, b_bytes = a.read_bytes(), b.read_bytes()
    assert a_bytes != b_bytes
    a.write_bytes(b_bytes)
    b.write_bytes(a_bytes)


def test_swapped_objects_of_one_kind_are_found(world, copy):
    target = world.targets["activations u8"]
    pairs = {
        "chunks of one array": sorted(copy.glob(f"targets/{target}/*/0/*/data_8/c/*/0/0/0"))[:2],
        "chunks of two views": [min(copy.glob(f"targets/{target}/*/{v}/*/data_8/c/0/0/0/0")) for v in (0, 1)],
        "markers of two views": sorted(copy.glob(f"done/target.{target}.*"))[:2],
        "bank markers of two shards": sorted(copy.glob("done/bank.*.0.json"))[:2],
        "indexes": sorted(copy.glob("shards/*.json"))[:2],
        "target manifests": sorted(copy.glob("targets/*activations*/manifest.json"))[:2],
        "signatures": sorted(copy.glob("banks/*/*/0/*/signatures/c/0/0"))[:2],
    }
    for kind, (a, b) in pairs.items():
        swap(a, b)
        names = [str(p.relative_to(copy)) for p in (a, b)]
        assert any(name in failure for failure in failures(copy) for name in names), kind
        with pytest.raises(UserError) as error:
            train_reads(copy, world, target)
        assert any(name in str(error.value) for name in names), kind
        swap(a, b)
    assert failures(copy) == []


def test_a_chunk_that_zarr_reads_as_zeros_is_an_error_here(world, copy):
    import zarr

    target = world.targets["logits"]
    chunk = min(copy.glob(f"targets/{target}/*/0/*/data/c/0/0"))
    before = chunk.read_bytes()
    chunk.unlink()
    assert not np.any(zarr.open_array(chunk.parents[2], mode="r")[:])
    with pytest.raises(UserError, match="missing: a chunk that was written is gone"):
        Store.open(copy).array(target).compute()
    chunk.write_bytes(before)


def test_an_image_that_changed_is_named_by_verify(world, copy, tmp_path):
    from storage.shards.index import cached_index, read_samples

    shard = tmp_path / Path(world.shards[0]).name
    index = cached_index(world.shards[0])
    data = bytearray(Path(world.shards[0]).read_bytes())
    (sample,) = read_samples(world.shards[0], index, range(75, 76))  # in a block that is neither first nor last
    data[data.index(sample.image) + len(sample.image) // 2] ^= 1
    shard.write_bytes(data)
    found = verify(Store.open(copy), [str(shard)], samples=0).failures
    assert any(index.keys[75] in failure for failure in found)


def test_superseded_attempts_are_a_notice_and_lost_markers_a_failure(copy):
    attempt = min(copy.glob("targets/*/*/0/*"))
    (attempt.parent / "feedfacefeedface").mkdir()
    (attempt.parent / "feedfacefeedface" / "x").write_bytes(b"x")
    report = verify(Store.open(copy))
    assert report.failures == []
    assert len(report.notices) == 1
    assert "1 attempt(s) left over" in report.notices[0]
    (attempt.parent / "feedfacefeedface" / "x").unlink()
    (attempt.parent / "feedfacefeedface").rmdir()


@pytest.mark.parametrize("kind", ["bank", "target"])
def test_a_manifest_that_is_gone_is_named_by_verify(world, tmp_path, kind):
    place = world.copy(tmp_path / "store")
    for path in (place / f"{kind}s").glob("*/manifest.json"):
        path.unlink()
        break
    found = failures(place)
    assert found
    assert any(str(path) in line for line in found), found
