"""Attention Copy: what is copied is what the student attends with, and training, evaluation and prediction agree."""

from __future__ import annotations

import itertools
import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from precompute.export.pytorch import live_teacher
from precompute.taps import Tap
from storage.errors import UserError
from storage.objects.state_dict import load_weights
from storage.objects.weights_file import WeightsFile
from storage.shards.shard import open_shards
from storage.store.codecs import Codec
from storage.store.store import Store
from storage.views.policy import policy
from student.attention_copy.inference import attach_stored_attention
from student.models.attention_copy_hooks import attention_copy_hooks
from student.models.build import build_student
from student.models.files import load_student
from student.recipe.validate import validate
from student.training import precision
from student.training import train as trainer
from student.training.distiller import find_targets
from student.training.precision import PrecisionChoice
from tests.conftest import Quiet, World, run_precompute, teacher_of
from tests.student.attention_copy.copying import (
    BANK,
    DEPTH,
    HEADS,
    SAME,
    SIZES,
    TAPS,
    VALIDATION,
    asked,
    distiller_of,
    logits_of,
    recipe_of,
    synthetic_png,
)
from tests.student.runs import command, job, log, run, same, start, wait_for
from tests.student.training.test_ranks import together
from tests.typed import grad, present


@pytest.fixture(scope="module")
def place(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of mixed views, and of evaluation views of the same shards."""
    place = tmp_path_factory.mktemp("copying") / "store"
    teacher = teacher_of(world.weights, "vit")
    wishes = ["attention,codec=f32", "q,k,v,codec=f32", "tokens,layers=1:3,codec=f32"]
    run_precompute(place, world.shards, teacher, wishes, policy=policy("deit", 32))
    run_precompute(place, world.shards, teacher, wishes, policy=VALIDATION, num_views=1, new_bank=True)
    return place


# ---------------------------------------------------------------------------------------------- what is copied


@pytest.mark.parametrize("what", TAPS)
@pytest.mark.parametrize("fused", [True, False])
def test_a_student_that_is_its_teacher_says_the_same_when_it_copies(world, place, what, fused):
    distiller, stream = distiller_of(world, place, {"tensors": what}, teachers=True)
    precision.apply(distiller, PrecisionChoice("none", fused))
    batch = next(stream.epoch(0))
    assert (batch.mix_weights > 0).any(), "mixed views"
    plain, _ = build_student(recipe_of({}).student, 3)
    plain.load_state_dict(load_file(world.weights["vit"]))
    with torch.no_grad():
        copied, _ = distiller.eval()(batch)
        expected = plain.eval()(batch.pixels((0.5,) * 3, (0.5,) * 3))
    assert torch.allclose(copied, expected, atol=2e-5)


def test_what_is_copied_matters_and_q_with_k_is_the_map(world, place):
    found = {what: logits_of(*distiller_of(world, place, {"tensors": what})) for what in TAPS}
    for name, other in itertools.combinations(("map", "q", "k", "v"), 2):
        assert not torch.allclose(found[name], found[other], atol=1e-4)
    assert torch.allclose(found["qk"], found["map"], atol=1e-5)


def test_the_map_comes_from_q_and_k_alike(world, place):
    store = Store.open(place)
    train = {m.identity.tap: id for id, m in store.targets().items() if "deit" in m.identity.bank}
    by_map, by_qk = ({"target": train["attention"]}, {"target": [train["q"], train["k"]]})
    first, second = (logits_of(*distiller_of(world, place, one)) for one in (by_map, by_qk))
    assert torch.allclose(first, second, atol=1e-5)


@pytest.mark.parametrize(
    ("what", "layers", "heads"),
    [
        ("map", None, None),
        ("map", "last-2", "first-2"),
        ("q", "first-1", None),
        ("k", [2], "first-1"),
        ("v", "last", None),
        ("qk", [1, 3], None),
    ],
)
def test_what_is_replaced_gets_no_gradient_and_all_else_does(world, place, what, layers, heads):
    distiller, stream = distiller_of(world, place, {"tensors": what, "layers": layers, "heads": heads})
    _, values = distiller(next(stream.epoch(0)))
    values["crossentropy"].backward()
    copied = {None: range(DEPTH), "last-2": range(DEPTH - 2, DEPTH), "first-1": [0], "last": [DEPTH - 1]}
    at = copied[layers] if not isinstance(layers, list) else [n - 1 for n in layers]
    count = int(heads.partition("-")[2]) if heads else HEADS
    width = SIZES["embed_dim"] // HEADS
    replaced = {"map": "qk", "qk": "qk"}.get(what, what)
    student: Any = distiller.student
    for n, block in enumerate(student.blocks):
        parts = block.attn.qkv.weight.grad.reshape(3, HEADS, width, -1)
        for part, gradient in zip("qkv", parts, strict=True):
            for head in range(HEADS):
                zero = n in at and part in replaced and head < count
                assert (gradient[head].abs().max() == 0) == zero, (n, part, head)
    others = [p for n, p in student.named_parameters() if "qkv" not in n]
    assert all(grad(p).abs().max() > 0 for p in others)


def test_contract_1_copied_from_an_f32_store_equals_copied_from_the_teacher_in_the_loop(world, place):
    """Loss and gradients of the same weights over some steps, mixing on; with a distillation loss beside it."""
    for what in TAPS:
        distiller, stream = distiller_of(
            world,
            place,
            {"tensors": what, "layers": "last-2", "heads": "first-2"},
            losses={"crossentropy": {}, "attention": {"layers": "first-1"}},
        )
        store = Store.open(place)
        ids = list(stream.source.targets)
        live = {}
        for id in ids:
            live[id] = live_teacher(teacher_of(world.weights, "vit"), [Tap.of(store.target(id).identity)], 32)
        optimizer = torch.optim.AdamW(distiller.parameters(), 1e-3)
        for batch, _ in zip(stream.epoch(0), range(5), strict=False):
            with torch.no_grad():
                now = {id: teacher(batch.images)[0] for id, teacher in live.items()}
            codecs = {id: Codec("f32", tuple(v.shape[1:]), 1) for id, v in now.items()}
            at_once = replace(batch, targets={id: {"data": v} for id, v in now.items()}, codecs=codecs)
            both = []
            for source in (at_once, batch):
                optimizer.zero_grad()
                loss = distiller.total(distiller(source)[1], 0)
                loss.backward()
                slopes = torch.cat([p.grad.flatten() for p in distiller.parameters() if p.grad is not None]).double()
                both.append((loss.item(), slopes))
            assert both[1][0] == pytest.approx(both[0][0], rel=1e-5)
            assert torch.nn.functional.cosine_similarity(both[0][1], both[1][1], dim=0) >= 1 - 1e-6
            optimizer.step()


def test_losses_see_the_q_that_is_used(world, place):
    distiller, stream = distiller_of(
        world, place, {"tensors": "qk"}, losses={"crossentropy": {}, "attention": {"tensors": "qk"}}
    )
    _, values = distiller(next(stream.epoch(0)))
    assert values["attention"] < 1e-10


def test_without_its_teacher_a_copying_student_does_not_run(world, place):
    distiller, stream = distiller_of(world, place, {"layers": "last"})
    batch = next(stream.epoch(0))
    with pytest.raises(UserError, match=r"attends with its teacher's attention in 1 layer\(s\), and nothing gives it"):
        distiller.student(batch.pixels((0.5,) * 3, (0.5,) * 3))
    distiller(batch)
    with pytest.raises(UserError, match="nothing gives it here"):
        distiller.student(batch.pixels((0.5,) * 3, (0.5,) * 3))


def test_under_autocast_and_compiled_it_copies_alike(world, place, monkeypatch):
    distiller, stream = distiller_of(world, place, {"layers": "first-2"})
    batch = next(stream.epoch(0))
    exact = distiller.eval()(batch)[0]
    student: Any = distiller.student
    for fused in (True, False):
        precision.apply(distiller, PrecisionChoice("bfloat16", fused))
        assert [block.attn.fused_attn for block in student.blocks] == [False, False, fused]
        assert torch.allclose(distiller(batch)[0], exact, atol=3e-2)
    precision.apply(distiller, PrecisionChoice("none", True))
    monkeypatch.setattr(precision, "BACKEND", "aot_eager")
    precision.compile_student(distiller)
    for one in (batch, *list(stream.epoch(1))[:2], batch):
        found = distiller(one)[0]
    assert torch.allclose(found, exact, atol=1e-5)


# ---------------------------------------------------------------------------------------------- averages


@pytest.mark.parametrize("average", ["layers", "heads", "queries"])
def test_averaged_maps_are_the_same_along_that_axis_and_sum_to_one(world, place, average):
    distiller, stream = distiller_of(world, place, {"average": average})
    batch = next(stream.epoch(0))
    target = batch.target(distiller.target_ids["attention_copy"][0])
    maps = present(distiller.copier).copied([target])["map"]
    axis = {"layers": 1, "heads": 2, "queries": 3}[average]
    assert torch.allclose(maps, target.mean(axis, keepdim=True).expand_as(target))
    assert torch.allclose(maps.sum(-1), torch.ones(()), atol=1e-5)
    assert not torch.allclose(maps, target, atol=1e-3)


def test_the_mean_over_examples_stands_for_all_and_goes_with_the_student(world, place, tmp_path, capsys):
    settings = [
        *SAME,
        "attention_copy.average=examples",
        "stream.bank.policy=deit",
        "model_ema_decay=0.5",
        "optim.epochs=1",
    ]
    store = Store.open(place)
    run(world, tmp_path / "run", "scratch", *settings, store=store)
    train = {m.identity.tap: id for id, m in store.targets().items() if "deit" in m.identity.bank}
    expected = store.array(train["attention"]).compute().mean(0, dtype="f8")
    for name in ("last", "ema"):
        model, _ = load_student(tmp_path / "run" / f"{name}.safetensors")
        (fixed,) = present(attention_copy_hooks(model)).fixed.values()
        assert torch.allclose(fixed[0].double(), torch.from_numpy(expected), atol=1e-6)
    scored = asked(
        capsys, "evaluate", "accuracy", tmp_path / "run", "--shards", world.shards[0], "--shards", world.shards[1]
    )
    assert scored["top1"] == json.loads((tmp_path / "run" / "result.json").read_text())["top1"]
    assert asked(capsys, "export", tmp_path / "run", "--shards", world.shards[0])["checked"] == 16
    text = (tmp_path / "run" / "README.md").read_text()
    assert "one fixed attention for all images" in text
    assert "create_model" not in text
    assert not (tmp_path / "run" / "config.json").exists()


# ---------------------------------------------------------------------------------------------- runs


RUN = [
    *SAME,
    "stream.bank.policy=deit",
    "student.global_pool=avg",
    "attention_copy.layers=last-2",
    "model_ema_decay=0.9",
    "optim.layer_decay=0.75",
    "optim.grad_accum_steps=2",
    "student.drop_path_rate=0.1",
]


@pytest.fixture(scope="module")
def trained(world: World, place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    run(
        world,
        out,
        "scratch",
        *RUN,
        f"student.weights={world.weights['vit']}",
        'student.init=["blocks.*"]',
        store=Store.open(place),
    )
    return out


def test_evaluation_and_prediction_say_what_training_said(world, place, trained, tmp_path, capsys):
    told = json.loads((trained / "result.json").read_text())
    shards = [word for shard in world.shards for word in ("--shards", shard)]
    for name, field in (("last", "top1"), ("ema", "ema_top1")):
        scored = asked(capsys, "evaluate", "accuracy", trained, *shards, "--checkpoint", name)
        assert (scored["top1"], scored["samples"]) == (told[field], 300)
    from storage.shards.index import cached_index, read_samples

    right = count = 0
    for url in world.shards:
        folder = tmp_path / Path(url).stem
        index = cached_index(url)
        for sample in read_samples(url, index, range(len(index))):
            (folder / f"class{sample.label}").mkdir(parents=True, exist_ok=True)
            (folder / f"class{sample.label}" / f"{sample.key.replace('/', '-')}.png").write_bytes(sample.image)
        for one in asked(capsys, "predict", trained, folder, "--top", 1)["images"]:
            right += one["classes"][0]["class"] == Path(one["image"]).parent.name
            count += 1
    assert count == 300
    assert 100 * right / count == pytest.approx(told["top1"], abs=0.01)
    assert told["targets"]["attention_copy"]


@pytest.mark.slow
def test_killed_and_resumed_it_ends_with_the_weights_of_an_undisturbed_run(world, place, tmp_path):
    for average in ("none", "examples"):
        settings = [
            *SAME,
            "stream.bank.policy=deit",
            f"attention_copy.average={average}",
            "model_ema_decay=0.9",
            "checkpoint_interval=2",
        ]
        store = Store.open(place)
        whole, out = tmp_path / f"whole {average}", tmp_path / f"run {average}"
        run(world, whole, "scratch", *settings, store=store)
        process = start([w if w != str(world.store) else str(place) for w in command(world, out, "scratch", *settings)])
        wait_for((out / "checkpoint.pt").exists, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (out / "result.json").exists()
        run(world, out, "scratch", *settings, store=store, resume=True)
        assert same(whole, out)


def _train(number: int, ranks: int, jobs: list[trainer.TrainConfig]) -> None:
    trainer.LOG_EVERY = 1
    for one in jobs:
        trainer.train(one, Quiet())


@pytest.mark.slow
def test_two_ranks_copy_as_one_does(world, place, tmp_path):
    settings = [
        *SAME,
        "stream.bank.policy=deit",
        "optim.opt=momentum",
        "optim.lr=0.01",
        "optim.epochs=1",
        "attention_copy.layers=first-2",
    ]
    jobs = [job(world, tmp_path / name, "scratch", *settings, store=Store.open(place)) for name in ("one", "two")]
    every = trainer.LOG_EVERY
    try:
        _train(0, 1, jobs[:1])
    finally:
        trainer.LOG_EVERY = every
    together(2, _train, jobs[1:])
    for ours, theirs in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert theirs["losses"] == pytest.approx(ours["losses"], rel=1e-5)
        assert theirs.get("top1") == ours.get("top1")


@pytest.mark.parametrize("control", ["permute_targets=3", "mean_targets=true"])
def test_a_control_copies_what_cannot_know_the_image_in_evaluation_too(
    world, place, trained, tmp_path, capsys, control
):
    out = tmp_path / "run"
    settings = [*SAME, "stream.bank.policy=deit", f"control.{control}", "optim.epochs=1", "attention_copy.tensors=map"]
    result = run(world, out, "scratch", *settings, store=Store.open(place))
    shards = [word for shard in world.shards for word in ("--shards", shard)]
    assert asked(capsys, "evaluate", "accuracy", out, *shards)["top1"] == result["top1"]
    model, about = load_student(out / "last.safetensors")
    image = tmp_path / "a.png"
    image.write_bytes(synthetic_png())
    if "mean" in control:
        assert present(attention_copy_hooks(model)).fixed["map"].shape[:3] == (1, DEPTH, HEADS)
        assert asked(capsys, "predict", out, image)["images"]
    else:
        attach_stored_attention(model, about, None, open_shards(world.shards))
        source = present(present(attention_copy_hooks(model)).source)
        assert source.stored.source(open_shards(world.shards)[0]).permute == 3
        plain = attention_copy_hooks(load_student(trained / "last.safetensors")[0])
        assert present(plain).source is None
        assert "is a control" in asked(capsys, "predict", out, image, status=1)["error"]


# ---------------------------------------------------------------------------------------------- what is missing


def test_a_copying_student_is_not_taken_for_a_whole_network(world, place, trained, tmp_path, capsys):
    told = asked(capsys, "export", trained, "--shards", world.shards[0], status=1)
    assert "attends with its teacher's attention" in told["error"]
    network, _ = build_student(recipe_of({}).student, 3)
    with pytest.raises(UserError, match="copies its teacher's attention is incomplete without the teacher"):
        load_weights(network, WeightsFile(trained / "last.safetensors"))
    text = (trained / "README.md").read_text()
    assert "It is not whole by itself" in text
    assert "- copied attention: target vit-attention" in text
    assert "create_model" not in text
    assert "there is no `config.json` for timm" in text
    assert not {"config.json", "model.safetensors"} & {path.name for path in trained.iterdir()}
    told = asked(capsys, "export", trained, "--push-to-hub", "alice/copying", status=1)
    assert "timm alone cannot build this student (it attends with its teacher's attention)" in told["error"]
    quiet = Quiet()
    settings = [*SAME, "student.global_pool=avg", f"student.weights={trained / 'last.safetensors'}", "optim.epochs=1"]
    trainer.train(job(world, tmp_path / "run", "scratch", *settings), quiet)
    assert any("what it would attend with by itself was never trained" in line for line in quiet.lines)
    assert attention_copy_hooks(load_student(tmp_path / "run" / "last.safetensors")[0]) is None


def test_a_student_s_file_that_says_nonsense_of_copying_is_refused(trained, tmp_path):
    from safetensors.torch import save_file

    model, about = load_student(trained / "last.safetensors")
    for change in ({"layers": [9]}, {"layers": "all"}, {"settings": {"tensors": "all"}}, {"heads": None}):
        metadata = {
            "model": about.model,
            "arguments": json.dumps(about.arguments),
            "img_size": "32",
            "mean": "[0.5,0.5,0.5]",
            "std": "[0.5,0.5,0.5]",
            "classes": "null",
            "evaluation": about.evaluation,
            "copying": json.dumps({**present(about.attention_copy).plain(), **change}),
        }
        save_file(model.state_dict(), tmp_path / "a.safetensors", metadata)
        with pytest.raises(UserError, match=r"a\.safetensors: (damaged: attention_copy|does not fit)"):
            load_student(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("copying", "student", "message"),
    [
        ({}, {"depth": 2}, r"attention_copy: the teacher has 3 layers, the student 2\n.* `attention_copy.layers="),
        ({}, {"num_heads": 2}, r"3 heads, the student 2\n.* `attention_copy.heads=first`, first-N"),
        ({}, {"patch_size": 4}, r"Resize the teacher's: `attention_copy.grid=bicubic`"),
        ({"layers": "last-4"}, {}, r"attention_copy.layers=last-4: the student has 3 layers, .*; at most last-3"),
        ({"heads": "first-4"}, {}, r"attention_copy.heads=first-4: the student has 3 heads, .*; at most first-3"),
        ({"layers": [[1, 2], [1, 3]]}, {}, r"attention_copy.layers: the student's layer 1 can copy one layer, not 2"),
        ({"tensors": "q"}, {"embed_dim": 96}, r"each head's q is 16 in the teacher, 32 in layer 1 .*\n  Copy maps"),
        ({}, {"model": "deit_tiny_distilled_patch16_224"}, r"the teacher lacks the student's distillation"),
        ({"teacher": "vitt"}, {}, r"attention_copy.teacher: asked for vitt, the store has vit"),
        ({}, {"model": "resnet18"}, r"it calls no attention kernel"),
    ],
)
def test_what_does_not_fit_is_one_clear_message(world, place, copying, student, message):
    if student.get("model") == "resnet18":
        recipe = validate(
            {"student": student, "losses": {"crossentropy": {}}, "attention_copy": copying, **BANK}, "test"
        )
        store = Store.open(place)
        with pytest.raises(UserError, match=message):
            find_targets(store, store.shard_ids(), recipe, build_student(recipe.student, 3)[0])
        return
    with pytest.raises(UserError, match=message):
        distiller_of(world, place, copying, student=student)
