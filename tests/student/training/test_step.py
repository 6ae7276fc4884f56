"""One update: pieces equal the whole, rates by layer, clipping, averages, dropouts; TensorBoard and the log."""

from __future__ import annotations

import builtins
import json
from typing import Any

import pytest
import torch

from pipeline.recipes.loader import load_recipe
from storage.errors import UserError
from storage.views.policy import policy
from student import run_dir
from student.evaluation.accuracy import evaluate
from student.models.build import build_student
from student.models.files import load_student
from student.training.optimizer import build_optimizer, learning_rate
from student.training.setup import build_run
from student.training.step import Update
from student.training.step_record import StepRecord
from tests.conftest import Quiet
from tests.student.runs import STUDENT, job, log, run, u8, weights

CPU = torch.device("cpu")


def gradients(world, tmp_path, *settings):
    """Gradients of the first batch, and the numbers of its step."""
    made = build_run(job(world, tmp_path / "run", "aal", u8(world), "optim.opt=sgd", *settings), Quiet(), None)
    recipe = job(world, tmp_path / "run", "aal", u8(world), "optim.opt=sgd", *settings).recipe
    optimizer, _ = build_optimizer(recipe, made.distiller, 9)
    update = Update(recipe, made.distiller, optimizer, average=None, device=CPU, scaled=False)
    record = StepRecord(10)
    record.add(update(next(made.stream.epoch(0)), 0, 0))
    (numbers,) = record.fetch()
    return {name: p.grad for name, p in made.distiller.named_parameters()}, numbers


@pytest.mark.parametrize("clip", ["null", "0.5"])
def test_a_batch_in_pieces_gives_the_gradients_of_the_whole(world, tmp_path, clip):
    whole, told = gradients(world, tmp_path, f"optim.clip_grad={clip}")
    pieces, said = gradients(world, tmp_path, f"optim.clip_grad={clip}", "optim.grad_accum_steps=4")
    assert said == pytest.approx(told, rel=1e-5)
    norm = torch.cat([g.flatten() for g in whole.values()]).norm()
    for name, gradient in whole.items():
        assert (pieces[name] - gradient).norm() <= 1e-5 * norm, name
    assert float(norm) == pytest.approx(0.5, rel=1e-3) if clip == "0.5" else norm > 1


def test_pieces_that_do_not_divide_the_batch_are_refused(world, tmp_path):
    with pytest.raises(
        UserError, match=r"batch_size=32 cannot be split into 1 rank\(s\) of optim\.grad_accum_steps=5 equal"
    ):
        run(world, tmp_path / "run", "scratch", "optim.grad_accum_steps=5")


def test_the_average_is_evaluated_beside_the_student_and_written(world, tmp_path):
    result = run(world, tmp_path / "run", "scratch", "model_ema_decay=0.5")
    epochs = [r for r in log(tmp_path / "run") if "step" not in r]
    assert result["ema_top1"] == epochs[-1]["ema_top1"]
    model, about = load_student(tmp_path / "run" / "ema.safetensors")
    score = evaluate(model, world.shards, policy(about.evaluation, 32), about.mean, about.std)
    assert score.top1 == result["ema_top1"]
    left = weights(tmp_path / "run")
    assert not torch.equal(left["ema head.weight"], left["last head.weight"])
    assert torch.allclose(left["ema head.weight"], left["last head.weight"], atol=0.05)


def test_rates_fall_by_layer_and_links_have_the_full_one(world, tmp_path):
    asked = job(world, tmp_path / "run", "aal", u8(world), "optim.layer_decay=0.5", "optim.opt_betas=[0.8, 0.9]")
    made = build_run(asked, Quiet(), None)
    optimizer, scheduler = build_optimizer(asked.recipe, made.distiller, 9)
    scheduler.step_update(0)
    names = {p: name for name, p in made.distiller.named_parameters()}
    rates = {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates.keys() == set(names.values())
    full = rates["losses.aal.aal.links.weight"]
    assert rates["losses.aal.aal.links.bias"] == full == learning_rate(optimizer) == pytest.approx(0.002)
    assert rates["student.blocks.1.attn.qkv.weight"] == pytest.approx(2 * rates["student.blocks.0.attn.qkv.weight"])
    assert rates["student.blocks.0.norm1.weight"] == pytest.approx(2 * rates["student.patch_embed.proj.weight"])
    decays = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {decays[n] for n in ("student.pos_embed", "student.cls_token", "student.head.bias")} == {0}
    assert decays["losses.aal.aal.links.weight"] == 0.05
    assert {tuple(group["betas"]) for group in optimizer.param_groups} == {(0.8, 0.9)}
    with pytest.raises(UserError, match=r"optim\.opt_betas: sgd does not take them"):
        build_optimizer(
            job(world, tmp_path, "scratch", "optim.opt=sgd", "optim.opt_betas=[0.8,0.9]").recipe, made.distiller, 9
        )


def test_dropouts_reach_the_student():
    settings = [
        "student.drop_path_rate=0.3",
        "student.drop_rate=0.4",
        "student.proj_drop_rate=0.1",
        "student.attn_drop_rate=0.2",
        "student.global_pool=avg",
    ]
    built, arguments = build_student(load_recipe("scratch", [*STUDENT, *settings]).student, 3)
    model: Any = built
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)
    assert (model.head_drop.p, model.blocks[0].attn.proj_drop.p, model.blocks[0].attn.attn_drop.p) == (0.4, 0.1, 0.2)
    assert (model.global_pool, arguments["global_pool"]) == ("avg", "avg")


def test_metrics_and_losses_are_logged_and_shown_in_tensorboard(world, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = ["tensorboard=true", "losses.deit.target=" + world.targets["logits"], "losses.deit.same_classes=true"]
    run(world, tmp_path / "run", "scratch", *settings, "model_ema_decay=0.9")
    epochs = [r for r in log(tmp_path / "run") if "step" not in r]
    assert 0 <= epochs[-1]["metrics"]["deit agreement"] <= 1
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    assert [e.step for e in board.Scalars("epochs/top1")] == [8, 17]
    for name in ("epochs/losses/deit", "epochs/metrics/deit agreement", "epochs/ema_top1", "epochs/lr", "steps/loss"):
        assert name in board.Tags()["scalars"]
    assert board.Scalars("epochs/losses/deit")[-1].value == pytest.approx(epochs[-1]["losses"]["deit"])


def test_tensorboard_that_is_missing_is_said_at_once(world, tmp_path, monkeypatch):
    original = builtins.__import__

    def without(name, *arguments, **named):
        if name.startswith(("tensorboard", "torch.utils.tensorboard")):
            raise ImportError(name)
        return original(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="needs the package tensorboard: pip install"):
        run(world, tmp_path / "run", "scratch", "tensorboard=true")
    assert not (tmp_path / "run").exists()


def test_a_log_is_cut_back_to_where_a_run_goes_on(tmp_path):
    log = run_dir.Log(tmp_path)
    log.write({"epoch": 0, "step": 0}, 0)
    kept = log.sync()
    log.write({"epoch": 0, "step": 50}, 50)
    log.close()
    again = run_dir.Log(tmp_path, keep=kept)
    assert again.sync() == kept
    again.write({"epoch": 0, "step": 50, "again": True}, 50)
    assert again.sync() > kept
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [{"epoch": 0, "step": 0}, {"epoch": 0, "step": 50, "again": True}]
