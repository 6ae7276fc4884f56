"""Bad input by name: values that are no numbers or too large, images that cannot be decoded."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from storage.errors import UserError
from storage.store.banks import read_views
from storage.store.markers import Task
from storage.store.store import Store
from storage.views.render import BadImage, decode
from tests.conftest import World, run_precompute, teacher_of
from tests.precompute.stores import CNN, F32, VIT, attempts, counted, failures, rewritten, seeded, small_shard, told

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_teacher_that_gives_no_number_fails_by_name_and_nothing_is_marked(
    world: World, tmp_path: Path, watch: Any, value: float
) -> None:
    place = seeded(world, tmp_path / "store")
    batches = iter(range(100))

    def spoil(outputs: list[np.ndarray]) -> None:
        if next(batches) in (3, 7):  # second block, second view, of each shard: the first fails at its second block
            outputs[0].reshape(len(outputs[0]), -1)[5, 321] = value

    watch(spoil)
    with pytest.raises(
        UserError, match=r"key 'shard-000000-00069', view 1: the teacher 'cnn' gives .* not finite"
    ) as e:
        run_precompute(place, world.shards, teacher_of(world.weights, "cnn"), CNN)
    assert world.shards[0] in str(e.value)
    assert not Store.open(place).done()
    assert not attempts(place)


@pytest.fixture
def corrupt(world: World, tmp_path: Path) -> str:
    """A shard of 150 samples with two images that cannot be decoded: numbers 3 and 80."""
    damage = {3: lambda data: data[: len(data) // 2], 80: lambda data: b"not an image"}
    return rewritten(
        world.shards[0],
        tmp_path / "corrupt" / "corrupt-000000.tar",
        lambda number, ending, data: damage[number](data) if ending == "png" and number in damage else data,
    )


def test_an_image_that_cannot_be_decoded_fails_its_shard_by_key(world: World, tmp_path: Path, corrupt: str) -> None:
    place = seeded(world, tmp_path / "store")
    with pytest.raises(UserError, match=r"corrupt-000000.tar: key 'shard-000000-00003'.*\n.*`on_decode_error=skip`"):
        run_precompute(place, [world.shards[1], corrupt], teacher_of(world.weights, "cnn"), CNN)
    store = Store.open(place)
    assert {task.shard for task in store.done()} == {store.require(world.shards[1], store.shard_ids()).id}
    assert attempts(place) == counted(place)


def test_an_image_that_cannot_be_decoded_in_the_first_shard_stops_no_other(
    world: World, tmp_path: Path, corrupt: str
) -> None:
    result, _ = told(tmp_path / "store", dataclasses.replace(world, shards=[corrupt, world.shards[1]]), "cnn", F32)
    assert [failure["shard"] for failure in result["failures"]] == [corrupt]
    assert not failures(tmp_path / "store", world.shards[1:])
    assert len(result["shards"]) == 1


def test_images_that_cannot_be_decoded_are_left_out_when_asked_for(world: World, tmp_path: Path, corrupt: str) -> None:
    place = seeded(world, tmp_path / "store")
    result = run_precompute(place, [corrupt], teacher_of(world.weights, "cnn"), CNN, on_decode_error="skip")
    assert result["invalid"] == [f"{corrupt}: shard-000000-00003", f"{corrupt}: shard-000000-00080"]
    store = Store.open(place)
    for view in (0, 1):
        marker = store.marker(Task("bank", result["bank"], result["shards"][0], view))
        assert marker.bank.invalid == (3, 80)
        views = read_views(marker, 0, 150)
        assert [i for i in range(150) if not views.view(i).valid] == [3, 80]
        assert [i for i in range(150) if not views.signatures[i]] == [3, 80]
    assert not failures(place, [corrupt])


def test_a_second_teacher_agrees_which_images_are_invalid(world: World, tmp_path: Path, corrupt: str) -> None:
    place = seeded(world, tmp_path / "store")
    run_precompute(place, [corrupt], teacher_of(world.weights, "cnn"), CNN, on_decode_error="skip")
    with pytest.raises(UserError, match="key 'shard-000000-00003'"):
        run_precompute(place, [corrupt], teacher_of(world.weights, "vit"), VIT)
    result = run_precompute(place, [corrupt], teacher_of(world.weights, "vit"), VIT, on_decode_error="skip")
    assert len(result["invalid"]) == 2
    assert not failures(place, [corrupt])


def test_contract_5_an_image_that_was_invalid_and_is_not_any_more_is_refused(
    world: World, tmp_path: Path, corrupt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = seeded(world, tmp_path / "store")
    run_precompute(place, [corrupt], teacher_of(world.weights, "cnn"), F32, on_decode_error="skip")

    def lenient(data: bytes) -> Image.Image:  # as a newer decoder may be
        try:
            return decode(data)
        except BadImage:
            return Image.new("RGB", (40, 32))

    monkeypatch.setattr("precompute.engine.stages.decode", lenient)
    with pytest.raises(UserError, match="view 0, key shard-000000-00003: image: expected invalid, found valid"):
        run_precompute(place, [corrupt], teacher_of(world.weights, "vit"), VIT, on_decode_error="skip")


def test_scales_that_f16_cannot_hold_are_kept_in_f32(world: World, tmp_path: Path, watch: Any) -> None:
    def grow(outputs: list[np.ndarray]) -> None:
        for output in outputs:
            output *= np.float32(1e7)

    watch(grow)
    shard = world.shards[:1]
    run_precompute(
        tmp_path / "store", shard, teacher_of(world.weights, "cnn"), ["activations,grid=8,codec=u8"], num_views=1
    )
    store, original = Store.open(tmp_path / "store"), Store.open(world.store)
    (task,) = [t for t in store.done() if t.kind == "target"]
    arrays = store.marker(task).arrays
    assert arrays["scale"].dtype == np.float32
    exact = (
        original.marker(Task("target", world.targets["activations f32"], task.shard, 0)).arrays["data_8"].read(0, 150)
    )
    kept = {name: array.read(0, 150) for name, array in arrays.items()}
    found = store.target(task.id).codec.values_of(kept)["data_8"]
    error = np.abs(found - exact * 1e7)
    steps = kept["scale"][:, : exact.shape[1], :1, None]  # of the largest maps first
    assert (error <= steps * 0.51 + 1e-4 * np.abs(exact * 1e7).max()).all()
    assert not failures(tmp_path / "store", shard)


def test_f32_scales_of_one_view_leave_the_others_in_f16(world: World, tmp_path: Path, watch: Any) -> None:
    teacher, wishes = teacher_of(world.weights, "cnn"), ["activations,grid=8,codec=u8"]
    small = small_shard(tmp_path / "data", 70)
    run_precompute(tmp_path / "store", small, teacher, wishes, num_views=1)
    watch(lambda outputs: [np.multiply(output, np.float32(1e7), out=output) for output in outputs])
    run_precompute(tmp_path / "store", small, teacher, wishes, num_views=2)
    store = Store.open(tmp_path / "store")
    kinds = {t.view: store.marker(t).arrays["scale"].dtype for t in store.done() if t.kind == "target"}
    assert kinds == {0: np.float16, 1: np.float32}
    assert not failures(tmp_path / "store", small)
