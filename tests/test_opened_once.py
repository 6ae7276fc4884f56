"""Indexes of shards, files of weights and stored views are opened once: as often as there are files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from safetensors.torch import load_file

from storage.shards import shard as shards
from storage.shards.index import cache_folder, cached_index
from storage.shards.shard import open_shards
from storage.store.store import Store
from storage.testing import synthetic_shards
from storage.views.policy import policy
from storage.views.view import View
from student.data.stream import Stream
from student.evaluation.accuracy import tell_of_shared
from student.evaluation.batches import evaluation_batches
from tests.conftest import run_precompute, teacher_of
from tests.opens import counted_opens
from tests.student.runs import run, u8

if TYPE_CHECKING:
    from collections.abc import Iterator


def once(folder: Path) -> Counter[str]:
    return Counter(path.name for path in folder.glob("*.json"))


@pytest.fixture
def val(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Validation shards whose indexes are in a cache that holds nothing else."""
    monkeypatch.setenv("TEACHER_STORE_CACHE", str(tmp_path / "cache"))
    cache_folder.cache_clear()
    urls = synthetic_shards(tmp_path / "val", shards=3, samples=40, classes=3, seed=7, stem="val")
    for url in urls:
        cached_index(url)
    yield urls
    cache_folder.cache_clear()


def test_a_training_opens_each_index_once(world, val, tmp_path) -> None:
    store = world.copy(tmp_path / "store")
    with counted_opens(store / "shards", tmp_path / "cache") as opens:
        run(world, tmp_path / "run", "aal", u8(world), store=Store.open(store), val=val)
    assert opens == once(store / "shards") + once(tmp_path / "cache")


def test_each_loader_worker_opens_an_index_once_more_at_most(world, tmp_path) -> None:
    store = world.copy(tmp_path / "store")
    with counted_opens(store / "shards") as opens:
        stream = Stream(world.shards, batch_size=32, store=store, targets=[world.targets["logits"]], workers=2)
        for _ in range(3):
            list(stream)
        del stream
    assert opens <= Counter(dict.fromkeys(once(store / "shards"), 1 + 2))
    assert opens > once(store / "shards")


def test_shards_beyond_those_that_a_process_keeps_are_read_again(val, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(shards, "OPEN_INDEXES", 2)
    opened, view = open_shards(val), policy("eval", 32)
    whole = [batch.ids.tolist() for batch in evaluation_batches(opened, view, 64)]
    with counted_opens(tmp_path / "cache") as opens:
        assert [batch.ids.tolist() for batch in evaluation_batches(opened, view, 64)] == whole
        tell_of_shared([one.id for one in opened], opened, print)
    assert opens == once(tmp_path / "cache")
    monkeypatch.setattr(shards, "OPEN_INDEXES", 3)
    list(evaluation_batches(opened, view, 64))
    with counted_opens(tmp_path / "cache") as opens:
        list(evaluation_batches(opened, view, 64))
    assert not opens


def test_a_precompute_opens_each_index_and_its_weights_once(world, tmp_path) -> None:
    place, weights = world.copy(tmp_path / "store"), Path(world.weights["vit"])
    with counted_opens(weights.parent) as library:
        load_file(weights)
    expected = library[weights.name] + 2  # tensors; the digest, and the header before torch is there
    Store.create(tmp_path / "new")
    for store in (place, tmp_path / "new"):  # the teacher is known, or new: it is described and exported
        (store / "shards").mkdir(exist_ok=True)
        known = once(store / "shards")
        with counted_opens(store / "shards", weights.parent) as opens:
            run_precompute(store, world.shards, teacher_of(world.weights, "vit"), ["embedding"])
        assert opens[weights.name] == expected
        assert Counter({name: count for name, count in opens.items() if name in once(store / "shards")}) == known


def test_each_stored_view_is_parsed_once(world, monkeypatch) -> None:
    parsed: list[View] = []
    parse = View.of

    def counted(row) -> View:
        parsed.append(parse(row))
        return parsed[-1]

    monkeypatch.setattr(View, "of", counted)
    stream = Stream(world.shards, batch_size=30, lanes=1, store=world.store, targets=[world.targets["logits"]])
    assert sum(len(batch.labels) for batch in stream) == 300
    assert len(parsed) == 300
