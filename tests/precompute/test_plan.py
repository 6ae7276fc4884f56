"""Contract 8: what a plan says is what a run then takes, and a plan leaves nothing behind."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pipeline.cli import main
from precompute.plan import plan
from precompute.request import PrecomputeRequest
from precompute.results import MissingAmount
from precompute.run import precompute
from precompute.taps.target_spec import parse_target
from precompute.throughput import growing
from storage.errors import IdentityError, UserError
from storage.shards.pack import pack
from storage.store.store import Store
from storage.testing import TINY_CNN, synthetic_shards
from storage.views.policy import policy
from tests.conftest import Quiet, World, teacher_of, write_teacher

if TYPE_CHECKING:
    from collections.abc import Sequence


def wanted_of(
    world: World, shards: list[str], targets: list[str], kind: str = "cnn", **changes: Any
) -> PrecomputeRequest:
    settings = {
        "shards": shards,
        "teacher": teacher_of(world.weights, kind),
        "policy": policy("deit", 32),
        "num_views": 2,
        "targets": [spec for text in targets for spec in parse_target(text)],
        "policy_fields": frozenset({"line", "size"}),
    }
    return PrecomputeRequest(**{**settings, **changes})


def taken(place: Path) -> tuple[int, int]:
    """Bytes and objects of a store."""
    sizes = [path.stat().st_size for path in place.rglob("*") if path.is_file()]
    return sum(sizes), len(sizes)


CASES: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "u8 and topk": ("cnn", ["activations,grid=8,codec=u8", "logits,codec=topk2"], {}),
    "f32 with pixels": ("cnn", ["activations,grid=4,codec=f32"], {"store_views": True}),
    "log8": ("vit", ["class_row,codec=log8", "class_token", "q,k,layers=last"], {"num_views": 3}),
}


@pytest.mark.parametrize("case", CASES)
def test_contract_8_bytes_and_objects_are_those_of_the_run(world: World, tmp_path: Path, case: str) -> None:
    kind, targets, changes = CASES[case]
    wanted = wanted_of(world, world.shards, targets, kind, **changes)
    place = tmp_path / "store"
    told = plan(str(place), wanted, Quiet(), seconds=0.2)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
    precompute(Store.create(place), wanted, Quiet())
    size, objects = taken(place)
    assert told.bytes == pytest.approx(size, rel=0.02)
    assert told.objects == told.missing.objects == objects
    assert told.measured
    assert told.measured.view_images > 0
    assert told.hours
    again = plan(str(place), wanted, Quiet(), seconds=0)
    assert again.missing == MissingAmount(bytes=0, objects=0, view_images=0)
    assert again.hours is None
    assert plan(str(place), wanted, Quiet(), seconds=0.1).hours == 0
    assert taken(place) == (size, objects), "a plan changes nothing in a store"


def test_a_tenth_of_the_images_is_measured_at_most(world: World, tmp_path: Path) -> None:
    told = plan(str(tmp_path / "store"), wanted_of(world, world.shards, ["logits"]), Quiet(), seconds=600)
    assert told.missing.view_images == 600
    assert told.measured
    assert 0 < told.measured.view_images <= 60


class Engine:
    """Takes some time to open and then so long for each view image, by a clock of its own."""

    def __init__(self, opening: float, each: float, noise: Sequence[float] = (1,), views: int = 4) -> None:
        self.opening, self.each, self.noise, self.views = opening, each, noise, views
        self.rounds: list[float] = []

    def __call__(self, samples: int) -> tuple[float, int]:
        images = samples * self.views
        time = images * self.each * self.noise[len(self.rounds) % len(self.noise)]
        self.rounds.append(time + (0 if self.rounds else self.opening))
        return self.rounds[-1], images


@pytest.mark.parametrize("each", [0.001, 0.01, 0.1, 1.0])  # seconds of a view image
@pytest.mark.parametrize("todo", [1_000, 10_000, 1_000_000])
@pytest.mark.parametrize("noise", [(1,), (1, 1.02, 0.99), (1, 1.4, 0.8, 1.2)])
def test_measuring_takes_a_tenth_of_what_the_run_takes_at_most(each: float, todo: int, noise: Sequence[float]) -> None:
    engine = Engine(2.0, each, noise)
    found = growing(engine, todo, 60)
    assert found.images <= todo / 10
    assert sum(engine.rounds) == pytest.approx(found.seconds)
    work = todo * each * max(noise)
    assert sum(engine.rounds[1:]) <= 0.1 * work
    assert found.seconds <= 0.1 * (2.0 + work) or len(engine.rounds) <= 2, "opening may take longer than a tenth"
    assert found.seconds <= max(60 * max(noise) / min(noise), engine.rounds[0])
    if len(engine.rounds) > 1:
        assert min(noise) <= 1 / (found.rate * each) <= max(noise)


def test_measuring_stops_when_rounds_agree_and_goes_on_while_they_do_not() -> None:
    steady, shaky = Engine(5.0, 0.01), Engine(5.0, 0.01, (1, 1.4, 0.8, 1.2))
    assert growing(steady, 10**7, 60).seconds == pytest.approx(5 + 0.01 * 4 * 8 * (1 + 2 + 4 + 8))
    assert 30 <= growing(shaky, 10**7, 60).seconds <= 90
    assert len(steady.rounds) == 4


def test_of_a_tiny_run_one_round_is_measured() -> None:
    engine = Engine(5.0, 0.01)
    found = growing(engine, 40, 60)
    assert found.images == 32
    assert found.seconds == pytest.approx(5.32)
    assert found.rate == pytest.approx(32 / 5.32)


def test_a_target_that_is_added_costs_itself_alone(world: World, tmp_path: Path) -> None:
    place = tmp_path / "store"
    first = wanted_of(world, world.shards, ["activations,grid=8,codec=u8"])
    precompute(Store.create(place), first, Quiet())
    before, _ = taken(place)
    both = wanted_of(world, world.shards, ["activations,grid=8,codec=u8", "logits"], num_views=None)
    told = plan(str(place), both, Quiet(), seconds=0)
    assert told.views == 2, "as many as the bank has"
    precompute(Store.open(place), both, Quiet())
    after, _ = taken(place)
    assert told.bytes == pytest.approx(after, rel=0.1)
    assert told.missing.bytes == pytest.approx(after - before, rel=0.3, abs=60_000)  # a graph
    assert told.missing.view_images == 600


def test_many_shards_are_estimated_by_their_sizes(world: World, tmp_path: Path) -> None:
    shards = synthetic_shards(tmp_path / "data", shards=20, samples=30)
    told = plan(str(tmp_path / "store"), wanted_of(world, shards, ["logits"]), Quiet(), seconds=0)
    assert told.samples == pytest.approx(600, rel=0.03)
    assert told.estimated >= 12


def test_cheaper_codecs_are_told_with_their_error(world: World, tmp_path: Path) -> None:
    told = plan(str(tmp_path / "store"), wanted_of(world, world.shards, ["class_row"], "vit"), Quiet(), seconds=0)
    (target,) = told.targets
    assert target.error
    assert target.error.kl < 1e-5
    cheaper = {other.codec: other for other in target.cheaper}
    assert set(cheaper) == {"u8", "u4", "log8"}
    assert cheaper["log8"].bytes < target.bytes
    assert cheaper["log8"].kl < 1e-3


def test_blocks_of_few_classes_are_warned_of_and_pack_mends_it(world: World, tmp_path: Path) -> None:
    """Sorted by class as a folder is: blocks of 64 hold one or two of ten classes."""
    mixed = synthetic_shards(tmp_path / "data", shards=1, samples=640, classes=10)
    plain = plan(str(tmp_path / "store"), wanted_of(world, mixed, ["logits"]), Quiet(), seconds=0)
    assert not plain.warnings
    folder = tmp_path / "classes"
    import webdataset

    for sample in webdataset.WebDataset(mixed, shardshuffle=False):
        path = folder / f"class{int(sample['cls'])}" / f"{sample['__key__']}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sample["png"])
    in_order = pack(str(folder), str(tmp_path / "sorted-000000.tar"), shuffle=False).train
    (warning,) = plan(str(tmp_path / "store"), wanted_of(world, in_order, ["logits"]), Quiet(), seconds=0).warnings
    assert "half of the blocks hold 1 classes or fewer, of 10" in warning or "hold 2 classes" in warning
    assert "`pack(SHARDS, " in warning


def test_a_shard_that_cannot_be_read_is_an_error_and_nothing_is_left(world: World, tmp_path: Path) -> None:
    (shard,) = synthetic_shards(tmp_path / "data", shards=1, samples=10)
    Path(shard).write_bytes(Path(shard).read_bytes()[:3000])
    with pytest.raises(UserError, match="truncated"):
        plan(str(tmp_path / "store"), wanted_of(world, [shard], ["logits"]), Quiet(), seconds=0)
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_contract_5_another_teacher_under_a_recorded_name_is_refused(world: World, tmp_path: Path) -> None:
    place = tmp_path / "store"
    wanted = wanted_of(world, world.shards, ["logits"])
    precompute(Store.create(place), wanted, Quiet())
    other = teacher_of({**world.weights, "cnn": write_teacher(tmp_path / "o.safetensors", TINY_CNN, seed=9)}, "cnn")
    with pytest.raises(IdentityError, match="It is not the recorded teacher"):
        plan(str(place), dataclasses.replace(wanted, teacher=other), Quiet(), seconds=0)


def test_the_command_line_tells_the_plan(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, arguments = "resnet10t", ["channels=[8,12,16,24]", "stem_width=8", "num_classes=3"]
    flags = [
        "--teacher",
        name,
        "--weights",
        world.weights["cnn"],
        "--mean",
        "0.5",
        "--std",
        "0.5",
        "--input-size",
        "64",
        "--shards",
        world.shards[0],
        "--store",
        str(tmp_path / "S"),
        "--view-size",
        "32",
        "--num-views",
        "2",
    ]
    flags += [part for argument in arguments for part in ("--teacher-arg", argument)]
    with pytest.raises(SystemExit) as ended:
        main(["plan", *flags, "--measure", "0.2", "--json"])
    assert ended.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert told["measured"]["workers"] == 1
    with pytest.raises(SystemExit) as ended:
        main(["plan", *flags, "--measure", "0.2"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert "view images/s on 1 process(es)" in text
    assert "MB/s of targets" in text
    assert not (tmp_path / "S").exists()
