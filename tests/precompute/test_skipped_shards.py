"""Keys without an image and empty shards, from precompute to training: as if they were not there, and counted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main
from precompute.plan import plan
from storage.errors import UserError
from storage.shards.index import build_index
from storage.store.store import Store
from tests.conftest import Quiet, World, run_precompute, teacher_of
from tests.precompute.stores import CNN, assert_same, contents, failures, of_cnn, seeded
from tests.precompute.test_plan import wanted_of
from tests.storage.helpers import by_webdataset, write_tar
from tests.student.runs import run, same, u8

Skipped = tuple[Path, dict[str, Any]]  # a store and what its run gave


@pytest.fixture(scope="module")
def disturbed(world: World, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The world's shards, the first with keys as img2dataset leaves them, and an empty one between the two."""
    folder = tmp_path_factory.mktemp("disturbed")
    (folder / "classes.json").write_bytes((world.folder / "data" / "classes.json").read_bytes())
    members = [(f"{key}.{kind}", data) for key, found in by_webdataset(world.shards[0]) for kind, data in found.items()]
    for place in (0, 100, 300):  # each sample has two members
        members.insert(place, (f"lost{place}.json", b'{"status": "failed_to_download"}'))
        members.insert(place, (f"lost{place}.txt", b"a cat"))
    first = write_tar(folder / Path(world.shards[0]).name, members)
    empty = write_tar(folder / "shard-000009.tar", [])
    second = folder / Path(world.shards[1]).name
    second.write_bytes(Path(world.shards[1]).read_bytes())
    return [first, empty, str(second)]


@pytest.fixture(scope="module")
def skipped(world: World, disturbed: list[str], tmp_path_factory: pytest.TempPathFactory) -> Skipped:
    place = seeded(world, tmp_path_factory.mktemp("skipped") / "store")
    return place, run_precompute(place, disturbed, teacher_of(world.weights, "cnn"), CNN, on_decode_error="skip")


def test_they_fail_their_shard_with_the_way_out(world: World, disturbed: list[str], tmp_path: Path) -> None:
    place = seeded(world, tmp_path / "store")
    with pytest.raises(UserError) as error:
        run_precompute(place, disturbed, teacher_of(world.weights, "cnn"), CNN)
    for text in (
        disturbed[0],
        "key 'lost0' needs one image",
        "found json, txt",
        "3 keys",
        "`precompute(on_decode_error=skip)`",
    ):
        assert text in str(error.value)
    assert {task.shard for task in Store.open(place).done()} == {build_index(disturbed[2]).id}


def test_the_store_is_the_one_without_them(world: World, disturbed: list[str], skipped: Skipped) -> None:
    place, result = skipped
    assert_same(contents(place), of_cnn(contents(world.store)))
    assert {url: len(flaws) for url, flaws in result["left_out"].items()} == {disturbed[0]: 3}
    assert result["empty"] == [disturbed[1]]
    assert result["invalid"] == []
    assert len(result["shards"]) == 2
    assert failures(place, disturbed) == []


def test_an_empty_shard_alone_has_nothing_to_do(world: World, disturbed: list[str], skipped: Skipped) -> None:
    place, _ = skipped
    before = contents(place).keys()
    result = run_precompute(place, [disturbed[1]], teacher_of(world.weights, "cnn"), CNN)
    assert (result["failures"], result["shards"], result["empty"]) == ([], [], [disturbed[1]])
    assert contents(place).keys() == before


def test_training_on_them_is_training_without_them(
    world: World, disturbed: list[str], skipped: Skipped, tmp_path: Path
) -> None:
    store = Store.open(skipped[0])
    validation = [disturbed[1], *world.shards]
    run(world, tmp_path / "a", "aal", u8(world), "optim.epochs=1")
    run(world, tmp_path / "b", "aal", u8(world), "optim.epochs=1", shards=disturbed, val=validation, store=store)
    assert same(tmp_path / "a", tmp_path / "b")
    with pytest.raises(UserError, match="key 'lost0' needs one image"):  # without a store nobody said to skip them
        run(world, tmp_path / "c", "scratch", shards=disturbed, store=None)


def test_a_plan_counts_the_samples(world: World, disturbed: list[str], tmp_path: Path) -> None:
    wanted = wanted_of(world, world.shards, CNN)
    undisturbed = plan(str(tmp_path / "store"), wanted, Quiet(), seconds=0)
    skipping = dataclasses.replace(wanted, shards=disturbed, on_decode_error="skip")
    told = plan(str(tmp_path / "store"), skipping, Quiet(), seconds=0)
    for name in ("samples", "shards", "targets"):
        assert getattr(told, name) == getattr(undisturbed, name)
    with pytest.raises(UserError, match="key 'lost0' needs one image"):
        plan(str(tmp_path / "store"), dataclasses.replace(wanted, shards=disturbed), Quiet(), seconds=0)


def test_init_counts_the_samples(disturbed: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(disturbed[0]).parent
    with pytest.raises(SystemExit) as ended:
        main(["init", str(folder), "--json"])
    said = capsys.readouterr()
    assert ended.value.code == 0, said.err
    assert json.loads(said.out)["images"] == 300
    assert "3 key(s) make no sample, such as key 'lost0'" in said.err


def test_the_stream_says_what_it_leaves_out(disturbed: list[str], skipped: Skipped) -> None:
    from student.data.stream import Stream

    target = next(id for id in Store.open(skipped[0]).targets() if id.startswith("cnn-activations"))
    stream = Stream(disturbed, batch_size=32, store=skipped[0], targets=[target])
    assert stream.order.samples == 300
    assert stream.notices == ["1 shard(s) have no samples", "3 key(s) of the shards make no sample and are left out"]
