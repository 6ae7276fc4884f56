"""Controls: targets of other images, and the mean target."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from storage.errors import UserError
from storage.store.store import Store
from storage.testing import synthetic_shards
from student.data.stream import Stream
from student.models.build import build_student
from student.recipe.validate import validate
from student.targets.stored_target import stored_target
from student.training.controls import mean_targets
from student.training.distiller import Distiller
from student.training.train import train
from tests.conftest import Quiet, World, run_precompute, teacher_of
from tests.student.runs import job


@pytest.fixture(scope="module")
def target(world: World) -> str:
    return world.targets["activations f32"]


def stream(world, target, **more) -> Stream:
    return Stream(world.shards, batch_size=32, store=world.store, targets=[target], seed=2, **more)


def stored(world, target) -> dict[tuple[int, int, int], np.ndarray]:
    """(shard, sample, view) -> its target."""
    found = {}
    plain = stream(world, target)
    for epoch in range(2 * (plain.views or 1)):
        for batch in plain.epoch(epoch):
            for row, values in zip(batch.ids.tolist(), batch.target(target).numpy(), strict=True):
                found[tuple(row)] = values
    return found


def test_permuted_targets_are_those_of_another_image_of_the_block_and_all_else_is_the_same(world, target):
    known = stored(world, target)
    partners: dict[tuple[int, int], int] = {}
    plain, permuted = stream(world, target), stream(world, target, permute=7)
    for epoch in range(4):
        for a, b in zip(plain.epoch(epoch), permuted.epoch(epoch), strict=True):
            assert all(
                torch.equal(getattr(a, name), getattr(b, name)) for name in ("images", "labels", "mix_weights", "ids")
            )
            for (shard, sample, view), values in zip(b.ids.tolist(), b.target(target).numpy(), strict=True):
                block = range(sample // 64 * 64, min(sample // 64 * 64 + 64, 150))
                found = [
                    i for i in block if (shard, i, view) in known and np.array_equal(known[shard, i, view], values)
                ]
                assert len(found) == 1
                assert found[0] != sample
                assert partners.setdefault((shard, sample), found[0]) == found[0], "fixed over views and epochs"
    assert len(set(partners.items())) > 250
    for shard in (0, 1):
        taken = [partner for (s, _), partner in partners.items() if s == shard]
        assert len(set(taken)) == len(taken), "each image's target is given once"


def test_another_seed_permutes_otherwise_and_workers_alike(world, target):
    first, again, other = (next(iter(stream(world, target, permute=seed).epoch(0))) for seed in (7, 7, 8))
    assert torch.equal(first.target(target), again.target(target))
    assert not torch.equal(first.target(target), other.target(target))
    spread = next(iter(stream(world, target, permute=7, workers=2).epoch(0)))
    assert torch.equal(first.target(target), spread.target(target))


def test_a_sample_alone_in_its_block_keeps_its_target_and_it_is_said(world, tmp_path):
    shards = synthetic_shards(tmp_path / "data", shards=1, samples=65)
    result = run_precompute(tmp_path / "store", shards, teacher_of(world.weights, "cnn"), ["logits"], num_views=1)
    made = Stream(shards, batch_size=8, store=tmp_path / "store", targets=result["targets"], permute=1)
    assert made.notices == ["1 sample(s) are alone in their blocks and keep their own targets"]


def test_the_mean_target_is_the_mean_over_all_samples_and_views(world, target):
    for id in (target, world.targets["activations u8"], world.targets["class_row"]):
        mean = mean_targets(stream(world, id), Quiet())[id]
        expected = Store.open(world.store).array(id).compute().astype(np.float64).mean(0)
        assert np.allclose(mean.numpy(), expected, atol=1e-6)


def test_every_image_gets_the_mean(world, target):
    recipe = validate(
        {
            "student": {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3},
            "losses": {"aal": {}},
        },
        "test",
    )
    model, _ = build_student(recipe.student, 3)
    store = Store.open(world.store)
    distiller = Distiller(recipe, model, {"aal": (stored_target(store, target),)}, mean=(0.5,) * 3, std=(0.5,) * 3)
    seen = []
    distiller.losses["aal"].register_forward_pre_hook(lambda module, args: seen.append(args[0].targets[0]))
    made = stream(world, target)
    distiller.means = mean_targets(made, Quiet())
    batch = next(iter(made.epoch(0)))
    distiller(batch)
    assert seen[0].shape == batch.target(target).shape
    assert torch.equal(seen[0][3], distiller.means[target])


@pytest.mark.parametrize("control", ["permute_targets=3", "mean_targets=true"])
def test_a_run_with_a_control_says_so_and_records_it(world, tmp_path, control):
    settings = [f"losses.aal.target={world.targets['activations u8']}", f"control.{control}", "optim.epochs=1"]
    quiet = Quiet()
    result = train(job(world, tmp_path / "run", "aal", *settings), quiet)
    name, _, value = control.partition("=")
    assert result["control"] == {name: {"3": 3, "true": True}[value]}
    assert any(line.startswith("control: ") for line in quiet.lines)
    assert name in (tmp_path / "run" / "args.yaml").read_text()
    plain = train(job(world, tmp_path / "plain", "aal", *settings[:1], settings[2]), Quiet())
    assert plain["control"] == {}
    first, second = (json.loads((tmp_path / n / "log.jsonl").read_text().splitlines()[0]) for n in ("run", "plain"))
    assert first["losses"]["crossentropy"] == second["losses"]["crossentropy"], (
        "the first batch and student are the same"
    )
    assert first["losses"]["aal"] != second["losses"]["aal"]


def test_a_control_of_a_recipe_without_targets_is_refused(world, tmp_path):
    with pytest.raises(UserError, match="losses read none"):
        train(job(world, tmp_path / "run", "scratch", "control.permute_targets=1"), Quiet())


def test_the_mean_map_over_examples_is_one_of_maps_also_from_q_and_k_and_is_kept(world, tmp_path, monkeypatch):
    """Not the map of the mean q and the mean k; a resumed run has it from its checkpoint."""
    from safetensors.torch import load_file

    store = Store.open(world.store)
    settings = [
        "losses.attention.average=examples",
        "losses.attention.layers=last",
        "losses.attention.grid=bicubic",
        "student.patch_size=8",
        "optim.epochs=1",
    ]
    train(job(world, tmp_path / "run", "scratch", *settings), Quiet())
    q, k = (torch.from_numpy(store.array(world.targets[name]).compute()) for name in ("q", "k"))
    expected = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1).mean(0)
    kept = load_file(tmp_path / "run" / "losses.safetensors")["attention.rows.mean"]
    assert torch.allclose(kept, expected, atol=1e-6)
    assert not torch.allclose(kept, (q.mean(0) / 4 @ k.mean(0).transpose(-2, -1)).softmax(-1), atol=1e-4)
    (tmp_path / "run" / "result.json").unlink()
    quiet = Quiet()
    monkeypatch.setattr(quiet, "start", lambda what, total: quiet.lines.append(what))
    train(job(world, tmp_path / "run", "scratch", *settings, resume=True), quiet)
    assert "mean maps" not in quiet.lines
    assert torch.equal(load_file(tmp_path / "run" / "losses.safetensors")["attention.rows.mean"], kept)
