"""Precompute as a whole: complete once, adding touches nothing, and another shard or teacher is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from precompute.export import pytorch
from precompute.taps import Tap
from storage.errors import IdentityError, UserError
from storage.store.banks import read_views
from storage.store.markers import Task
from storage.store.store import Store
from storage.testing import TINY_CNN, synthetic_shards
from storage.views.policy import policy
from storage.views.render import render
from tests.conftest import HANGS, ROOT, World, run_precompute, teacher_of, write_teacher
from tests.precompute.stores import (
    CNN,
    F32,
    VIT,
    assert_same,
    contents,
    failures,
    of_cnn,
    rewritten,
    seeded,
    snapshot,
    told,
)


def flipped_in_place(path: str, sample: int, ending: str) -> None:
    """Change one bit in the middle of a member, with the tar's size and headers as they were."""
    with tarfile.open(path) as tar:
        member = [m for m in tar.getmembers() if m.name.endswith(f".{ending}")][sample]
    with Path(path).open("r+b") as file:
        file.seek(member.offset_data + member.size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


# ---------------------------------------------------------------------------------------------- once


def test_the_same_command_again_writes_nothing_and_says_so(world: World, tmp_path: Path) -> None:
    place = world.copy(tmp_path / "store")
    before = snapshot(place)
    for kind, wishes in (("cnn", CNN), ("vit", VIT)):
        result, lines = told(place, world, kind, wishes)
        assert (result["written"], result["view_images"], result["views"]) == (0, 0, 2)
        assert any(line.endswith("2 shard(s)") and kind in line for line in lines)
        assert "everything was already complete" in lines
    assert snapshot(place) == before


def test_contract_11_views_grow_by_those_that_are_missing_alone(world: World, tmp_path: Path) -> None:
    place = world.copy(tmp_path / "store")
    before, done = snapshot(place), Store.open(place).done()
    result = run_precompute(place, world.shards, teacher_of(world.weights, "cnn"), CNN, num_views=3)
    assert (result["written"], result["view_images"]) == (2 * len(CNN), 300)
    after = snapshot(place)
    assert {name: after[name] for name in before} == before
    added = Store.open(place).done() - done
    assert {(task.kind, task.view) for task in added} == {("bank", 2), ("target", 2)}
    assert len(added) == 2 * (len(CNN) + 1)
    assert not failures(place, world.shards)


def test_contract_11_a_target_of_a_new_tap_touches_nothing_that_is_there(world: World, tmp_path: Path) -> None:
    place = world.copy(tmp_path / "store")
    before, done = snapshot(place), Store.open(place).done()
    result, _ = told(place, world, "cnn", ["activations,layers=last,grid=2,codec=f16"])
    after = snapshot(place)
    assert {name: after[name] for name in before} == before
    assert {(task.kind, task.id) for task in Store.open(place).done() - done} == {("target", result["targets"][0])}
    assert not failures(place, [])


def test_contract_11_a_teacher_that_is_added_sees_the_views_that_are_there(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = seeded(world, tmp_path / "store")
    run_precompute(place, world.shards, teacher_of(world.weights, "cnn"), F32)
    before = snapshot(place)
    monkeypatch.setattr("precompute.engine.stages.draw_view", None)  # views are replayed, never drawn again
    wanted = {"policy_fields": frozenset(), "policy": policy("light", 224, 99), "num_views": None}
    result = run_precompute(place, world.shards, teacher_of(world.weights, "vit"), VIT, **wanted)
    assert (result["bank"], result["views"]) == (next(iter(Store.open(world.store).banks())), 2)
    after = snapshot(place)
    assert {name: after[name] for name in before} == before
    mine, theirs = contents(place), contents(world.store)
    assert_same(mine, {task: theirs[task] for task in mine})


def test_contract_5_a_teacher_that_would_see_other_pixels_is_refused(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = seeded(world, tmp_path / "store")
    run_precompute(place, world.shards, teacher_of(world.weights, "cnn"), F32)
    before = snapshot(place)
    monkeypatch.setattr("storage.store.banks.render", lambda image, view, size: render(image, view, size) ^ 1)
    with pytest.raises(UserError, match=r"view 0, key shard-000000-00000: signature of the view's pixels"):
        run_precompute(place, world.shards, teacher_of(world.weights, "vit"), VIT)
    assert snapshot(place) == before, "the attempt is gone too"


# ---------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("name", ["activations f32", "activations u8", "logits", "class_row", "class_token", "q", "k"])
def test_contract_1_what_is_stored_is_what_the_live_teacher_gives_on_the_views_of_the_bank(
    world: World, name: str
) -> None:
    store = Store.open(world.store)
    manifest = store.target(world.targets[name])
    codec = manifest.identity.codec
    kind = "cnn" if name.startswith(("act", "log")) else "vit"
    tap = Tap(manifest.identity.tap, layers=manifest.identity.layers, grid=manifest.identity.grid)
    module = pytorch.live_teacher(teacher_of(world.weights, kind), [tap], 32)
    url, view = world.shards[1], 1
    shard = store.require(url, store.shard_ids())
    bank = store.marker(Task("bank", manifest.identity.bank, shard.id, view))
    samples = shard.read(range(50, 90))
    views = read_views(bank, 50, 90)
    pixels = [views.replay(i, sample, sample.image, 32, url) for i, sample in enumerate(samples, 50)]
    with torch.no_grad():
        live = module(torch.from_numpy(np.stack(pixels)))[0].numpy()
    arrays = {
        key: a.read(50, 90) for key, a in store.marker(Task("target", manifest.id, shard.id, view)).arrays.items()
    }
    error = np.abs(manifest.codec.decode(arrays) - live)
    allowed = 1e-4 * np.abs(live).max()
    if codec == "u8":  # the error of a map that is resized is at most that of its codes, times what the weights add up
        gains = {int(side): np.abs(matrix).sum(1).max() ** 2 for side, matrix in manifest.resize.items()}
        gain = np.concatenate([np.full(stage.channels, gains.get(stage.side or 0, 1)) for stage in manifest.stages])
        allowed = allowed + arrays["scale"][..., :1, None].astype(np.float32) / 2 * gain[:, None, None]
    if codec == "f16":
        allowed = allowed + 2.0**-11 * np.abs(live)
    assert (error <= allowed).all()
    assert live.std(0).max() > 1e-3, "targets that are the same for all samples would prove little"


@pytest.mark.slow
def test_contract_3_another_process_with_the_shards_in_another_order_makes_the_same_store(
    world: World, tmp_path: Path
) -> None:
    place = tmp_path / "store"
    command = [
        sys.executable,
        "-m",
        "pipeline",
        "precompute",
        "--teacher",
        TINY_CNN[0],
        "--weights",
        world.weights["cnn"],
        "--teacher-arg",
        "channels=[8,12,16,24]",
        "--teacher-arg",
        "stem_width=8",
        "--teacher-arg",
        "num_classes=3",
        "--input-size",
        "64",
        "--mean",
        "0.5",
        "--std",
        "0.5",
        "--teacher-name",
        "cnn",
        *(f"--target={wish}" for wish in CNN),
        "--shards",
        world.shards[1],
        "--shards",
        world.shards[0],
        "--store",
        str(place),
        "--view-policy",
        "light",
        "--view-size",
        "32",
        "--num-views",
        "2",
        "--provider",
        "cpu",
        "--json",
    ]
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=HANGS, check=False)
    assert child.returncode == 0, child.stderr.decode()
    assert json.loads(child.stdout)["written"] == 2 * 2 * len(CNN)
    graphs = [[graph.name for graph in folder.glob("teachers/cnn/graphs/*")] for folder in (place, world.store)]
    assert len(graphs[0]) == 1
    assert graphs[0] == graphs[1], "the same graph from another process, checked on other images"
    assert_same(contents(place), of_cnn(contents(world.store)))


# ---------------------------------------------------------------------------------------------- identity


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"weights": "other"}, "weights sha256"),
        ({"mean": (0.4,)}, "mean"),
        ({"input_size": 96}, "input size"),
        ({"arguments": {**TINY_CNN[1], "num_classes": 3, "drop_rate": 0.1}}, "arguments"),
    ],
)
def test_contract_5_another_teacher_under_a_recorded_name_is_refused_and_changes_nothing(
    world: World, tmp_path: Path, changes: dict[str, Any], field: str
) -> None:
    place = world.copy(tmp_path / "store")
    before = snapshot(place)
    if "weights" in changes:
        changes = {"weights": write_teacher(tmp_path / "other.safetensors", TINY_CNN, seed=5)}
    other = teacher_of(world.weights, "cnn", **changes)
    with pytest.raises(IdentityError) as caught:
        run_precompute(place, world.shards, other, CNN)
    recorded = teacher_of(world.weights, "cnn")
    assert (caught.value.field, caught.value.expected, caught.value.found) == (
        field,
        recorded.identity.plain()[field],
        other.identity.plain()[field],
    )
    assert "`teacher_name=cnn-2`" in str(caught.value)
    assert snapshot(place) == before


def test_contract_5_a_shard_that_changed_in_its_middle_after_indexing_is_refused(world: World, tmp_path: Path) -> None:
    for sample, ending, field in ((100, "png", "image digest"), (100, "cls", "label")):
        place = world.copy(tmp_path / f"store {ending}")
        shutil.copytree(Path(world.shards[0]).parent, tmp_path / ending)
        shard = str(tmp_path / ending / Path(world.shards[0]).name)
        flipped_in_place(shard, sample, ending)
        before = snapshot(place)
        with pytest.raises(UserError, match=f"key shard-000000-00100: {field}|{field} of key shard-000000-00100"):
            run_precompute(place, [shard], teacher_of(world.weights, "cnn"), CNN, num_views=3)
        assert snapshot(place) == before


def test_a_shard_with_another_first_image_is_another_shard(world: World, tmp_path: Path) -> None:
    place = world.copy(tmp_path / "store")
    before = snapshot(place)
    donor = synthetic_shards(tmp_path / "donor", 1, 1, seed=9)[0]
    with tarfile.open(donor) as tar:
        member = next(m for m in tar.getmembers() if m.name.endswith(".png"))
        image = tar.extractfile(member).read()  # type: ignore[union-attr]
    shard = rewritten(
        world.shards[0],
        tmp_path / "data" / Path(world.shards[0]).name,
        lambda number, ending, data: image if number == 0 and ending == "png" else data,
    )
    result = run_precompute(place, [shard], teacher_of(world.weights, "cnn"), F32)
    assert result["shards"][0] not in Store.open(world.store).shard_ids()
    after = snapshot(place)
    assert {name: after[name] for name in before} == before
    assert not failures(place, [shard, world.shards[1]])


def test_the_same_shard_given_twice_is_refused(world: World, tmp_path: Path) -> None:
    twin = shutil.copy(world.shards[0], tmp_path)
    place = world.copy(tmp_path / "store")
    before = snapshot(place)
    with pytest.raises(UserError, match=r"holds the same samples as .*; give each shard once"):
        run_precompute(place, [world.shards[0], str(twin)], teacher_of(world.weights, "cnn"), CNN)
    assert snapshot(place) == before


@pytest.mark.parametrize(("line", "count"), [("none", 2), ("eval", 4)])
def test_more_than_one_view_of_a_policy_without_chance_is_refused(
    world: World, tmp_path: Path, line: str, count: int
) -> None:
    wanted = {"policy": policy(line, 32), "num_views": count}
    with pytest.raises(UserError, match=f"`num_views={count}`: .* leaves nothing to chance"):
        run_precompute(seeded(world, tmp_path / "s"), world.shards, teacher_of(world.weights, "cnn"), CNN, **wanted)
