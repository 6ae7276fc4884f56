"""Contract 1: training from the store gives what training with the teacher in the loop would give.

At each of 20 steps both losses are evaluated from the same weights, on the same view images: once with the stored
target, once with what the PyTorch teacher says of the batch's images at that moment.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from precompute.export.pytorch import live_teacher
from precompute.taps import Tap
from storage.store.codecs import Codec
from storage.store.store import Store
from storage.views.policy import policy
from storage.views.view import COLUMNS
from student.data.stream import Stream
from student.models.build import build_student
from student.models.init import normalization
from student.recipe.validate import validate
from student.targets.stored_target import StoredTarget, stored_target
from student.training.distiller import Distiller
from tests.conftest import World, run_precompute, teacher_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from precompute.teachers.teacher import Teacher
    from student.recipe.schema import Recipe

STEPS = 20
# The teacher has 3 layers of 3 heads, as the student, and 4x4 patches.
ROWS = {"layers": "uniform", "grid": "bicubic"}
MAPS = {"layers": [[1, 1], [3, 2]], "heads": "log", "grid": "bicubic"}


SIZES = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 3}


def recipe_of(**losses) -> Recipe:
    """A small student; cross-entropy and these losses."""
    content = {"losses": {"crossentropy": {"smoothing": 0.1}, **losses}, "stream": {"batch_size": 32}}
    return validate({"student": SIZES, **content}, "test")


def live_of(store: Store, targets: Sequence[str], teachers: dict[str, Teacher]) -> dict[str, torch.nn.Module]:
    """Target -> the PyTorch teacher with its tap, one and the same for targets that differ by their codec."""
    made: dict[tuple[str, Tap], torch.nn.Module] = {}
    found = {}
    for target in targets:
        manifest = store.target(target)
        key = manifest.teacher, replace(Tap.of(manifest.identity), native=False)  # resized by the teacher's own graph
        if key not in made:
            made[key] = live_teacher(teachers[key[0]], [key[1]], 32)
        found[target] = made[key]
    return found


def compare(
    stream: Stream,
    given: dict[str, tuple[StoredTarget, ...]],
    live: dict[str, torch.nn.Module],
    recipe: Recipe,
    classes: int,
    steps: int = STEPS,
):
    """Largest relative loss error and smallest gradient cosine over the steps, for the total and each loss."""
    torch.manual_seed(0)
    model, _ = build_student(recipe.student, classes)
    names = tuple("abcdefghij"[:classes])
    given = {
        loss: tuple(
            StoredTarget(target=g.target, teacher=g.teacher.model_copy(update={"classes": names})) for g in several
        )
        for loss, several in given.items()
    }
    mean, std = normalization(recipe.student, None)
    distiller = Distiller(recipe, model, given, mean=mean, std=std, class_names=names)
    for queue in distiller.queues:  # empty ones have nothing to say in the first step
        queue.push([torch.nn.functional.normalize(torch.randn(32, queue.entries.shape[1]), dim=1)])
    optimizer = torch.optim.AdamW(distiller.parameters(), 1e-3)
    worst = dict.fromkeys(("total", *given), (0.0, 1.0))
    step = 0
    while step < steps:
        for batch in stream.epoch(step // stream.order.steps):
            with torch.no_grad():
                said = {teacher: teacher(batch.images)[0] for teacher in dict.fromkeys(live.values())}
            now = {target: said[teacher] for target, teacher in live.items()}
            exact = {target: Codec("f32", tuple(values.shape[1:]), 1) for target, values in now.items()}
            at_once = replace(batch, targets={t: {"data": values} for t, values in now.items()}, codecs=exact)
            both = []
            parameters = list(distiller.parameters())
            for source in (at_once, batch):
                _, values = distiller(source)
                terms = {"total": distiller.total(values, 0), **values}
                gradients = {}
                for name in worst:
                    found = torch.autograd.grad(terms[name], parameters, retain_graph=True, allow_unused=True)
                    gradients[name] = torch.cat([g.flatten() for g in found if g is not None]).double()
                both.append((terms, gradients))
            (true, exactly), (stored, nearly) = both
            for name, (error, cosine) in worst.items():
                off = abs(stored[name].item() - true[name].item()) / abs(true[name].item())
                same = torch.nn.functional.cosine_similarity(exactly[name], nearly[name], dim=0).item()
                worst[name] = (max(error, off), min(cosine, same))
            optimizer.zero_grad()
            stored["total"].backward()
            optimizer.step()
            for queue in distiller.queues:
                queue.push([queue.offered])
            step += 1
            if step == steps:
                break
    return worst


def of_targets(
    store: Store,
    shards,
    teachers: dict[str, Teacher],
    recipe: Recipe,
    targets: dict[str, list[str]],
    classes: int,
    **more,
):
    """`compare` over a store's targets, loss -> ids."""
    ids = list(dict.fromkeys(id for several in targets.values() for id in several))
    stream = Stream(shards, batch_size=32, store=store, targets=ids, seed=1)
    given = {loss: tuple(stored_target(store, id) for id in several) for loss, several in targets.items()}
    return compare(stream, given, live_of(store, ids, teachers), recipe, classes, **more)


def of_world(world: World, codec: str, **losses):
    target = world.targets[f"activations {codec}"]
    teachers = {"cnn": teacher_of(world.weights, "cnn")}
    targets = {name: [target] for name in losses}
    return of_targets(Store.open(world.store), world.shards, teachers, recipe_of(**losses), targets, 3)


def test_aal_from_an_f32_store_equals_aal_with_the_teacher_in_the_loop(world):
    readings = {name: {"type": "aal", "distance": name} for name in ("mse", "norm", "sq")}
    worst = of_world(world, "f32", **readings)
    assert worst.keys() == {"total", *readings}
    for name, (error, cosine) in worst.items():
        assert error <= 1e-5, name
        assert cosine >= 1 - 1e-6, name


def test_aal_from_u8_stays_close_to_the_teacher_in_the_loop(world, record_property):
    worst = of_world(world, "u8", aal={})
    for name, (error, cosine) in worst.items():
        record_property(name, (error, cosine))
        assert 0 < error <= 1e-3
        assert 1 - 1e-3 <= cosine < 1


@pytest.fixture(scope="module")
def mixed(world, tmp_path_factory):
    """A store of `deit` views, mixup and CutMix on: its folder, and targets by their names."""
    place = tmp_path_factory.mktemp("deit") / "store"
    options = {"policy": policy("deit", 32), "num_views": 2}
    wishes = {
        "cnn": [f"activations,grid=8,codec={codec}" for codec in ("f32", "u8", "f16", "u4")]
        + [f"activations,grid=8,native=false,codec={codec}" for codec in ("f32", "u8", "u4")]
        + ["logits", "logits,codec=topk2"]
        + ["activations,grid=8,codec=f32,at=block", "activations,grid=8,codec=f32,at=block,antialias=true"],
        "vit": [f"{tap},codec={codec}" for tap in ("class_row", "attention") for codec in ("f32", "log8")]
        + ["logits", "class_token", *(f"{tap},codec=f32" for tap in ("q", "k", "v", "class_token", "tokens"))]
        + ["tokens,layers=2:3,codec=f32", "q,codec=f16"]
        + [f"tokens,q,k,class_token,codec={codec}" for codec in ("u8", "u4")],
    }
    names = {
        "cnn": [
            "f32",
            "u8",
            "f16",
            "u4",
            "resized f32",
            "resized u8",
            "resized u4",
            "logits",
            "topk",
            "block",
            "antialias",
        ],
        "vit": [
            "rows",
            "log8",
            "attention",
            "attention log8",
            "vit logits",
            "token f16",
            "q",
            "k",
            "v",
            "class_token",
            "tokens",
            "streams",
            "q f16",
            *(f"{tap} {codec}" for codec in ("u8", "u4") for tap in ("tokens", "q", "k", "token")),
        ],
    }
    targets: dict[str, str] = {}
    for kind, several in wishes.items():
        made = run_precompute(place, world.shards, teacher_of(world.weights, kind), several, **options)
        targets |= zip(names[kind], made["targets"], strict=True)
    return Store.open(place), targets


def test_contract_1_the_views_of_deit_are_mixed_in_both_ways(mixed):
    store, targets = mixed
    bank = store.target(targets["f32"]).identity.bank
    rows = np.concatenate(
        [store.marker(task).arrays["parameters"].read(0, 150) for task in store.done() if task.kind == "bank"]
    )
    assert bank.startswith("deit-32-")
    kinds, counts = np.unique(rows[:, COLUMNS.index("mix")], return_counts=True)
    assert list(kinds[-2:]) == [1, 2]
    assert (counts[-2:] > 200).all()


SOFT = {"type": "deit", "distillation_type": "soft"}
VECTORS = {"type": "attention", "grid": "bicubic"}
TOKENS = {"tokens": "both", "distance": "cosine", "depth": 2, "grid": "bicubic"}
# loss -> its settings, its targets, bounds of the loss's error and of 1 - cosine
EXACT = {
    "aal": ({}, ["f32"]),
    "aal_resized": ({"type": "aal"}, ["resized f32"]),
    "aal_block": ({"type": "aal"}, ["block"]),
    "aal_antialias": ({"type": "aal"}, ["antialias"]),
    "hard": ({"type": "deit", "distillation_type": "hard"}, ["logits"]),
    "soft": ({**SOFT, "temperature": 3, "weight": {"start": 1, "shape": "linear", "end": 0, "over": 4}}, ["logits"]),
    "soft_batch": ({**SOFT, "reduction": "batchmean"}, ["logits"]),
    "advit": (ROWS, ["rows"]),
    "advit_l2": ({"type": "advit", **ROWS, "distance": "l2"}, ["rows"]),
    "advit_maps": ({"type": "advit", **ROWS}, ["attention"]),
    "advit_qk": ({"type": "advit", **ROWS}, ["q", "k"]),
    "advit_kl": ({"type": "advit", **ROWS, "distance": "kl", "temperature": 2}, ["rows"]),
    "advit_log": ({"type": "advit", **ROWS, "distance": "kl", "kl_input": "log-prob", "heads": "sum"}, ["rows"]),
    "advit_ce": ({"type": "advit", **ROWS, "distance": "ce", "heads": "max", "renorm": True}, ["rows"]),
    "heads": ({"type": "head_specific", **ROWS, "heads": [[1, 3], [3, 2]]}, ["q", "k"]),
    "heads_mse": ({"type": "head_specific", **ROWS, "distance": "mse-softmax"}, ["q", "k"]),
    "heads_ce": ({"type": "head_specific", **ROWS, "distance": "ce", "adaptive": "student-correct"}, ["attention"]),
    "heads_kl": (
        {
            "type": "head_specific",
            "layers": [[1, 1], [3, 2]],
            "grid": "bicubic",
            "distance": "kl",
            "heads": {1: [[1, 2]], 3: [[2, 3]]},
            "adaptive": "teacher-correct",
        },
        ["attention", "vit logits"],
    ),
    "attention": ({**MAPS, "weight": 3}, ["attention"]),
    "q": ({**VECTORS, "tensors": "q"}, ["q"]),
    "k": ({**VECTORS, "tensors": "k"}, ["k"]),
    "v": ({**VECTORS, "tensors": "v", "heads": "first-2"}, ["v"]),
    "qk": ({**VECTORS, "tensors": "qk"}, ["q", "k"]),
    "features": ({"grid": "bicubic", "projection": "linear", "layers": "last-2"}, ["streams"]),
    "attention_mean": ({**MAPS, "type": "attention", "heads": "first", "average": "queries"}, ["attention"]),
    "attention_qk": ({"type": "attention", **MAPS, "heads": "first", "reduce_heads": "sum"}, ["q", "k"]),
    "guidance": ({}, ["rows"]),
    "guidance_all": ({"type": "guidance", "layers": None, "heads": "log", "distance": "mse"}, ["rows"]),
    "alignment": ({}, ["class_token"]),
    "alignment_tokens": (
        {"type": "alignment", **TOKENS},
        ["tokens"],
    ),
    "seed": ({"queue": 64}, ["class_token"]),
    "compress": ({"queue": 64}, ["class_token"]),
    "compress_two": ({"type": "compress", "queues": 2, "queue": 64}, ["class_token"]),
    "guidance_values": ({"type": "guidance", "heads": "max", "value_norm": True}, ["q", "k", "v"]),
}
CODED = {
    "u8": ({"type": "aal"}, ["u8"], 1e-3, 1e-3),
    "f16": ({"type": "aal"}, ["f16"], 1e-4, 1e-5),
    "u4": ({"type": "aal"}, ["u4"], 2e-2, 2e-2),
    "resized_u8": ({"type": "aal"}, ["resized u8"], 1e-3, 1e-3),
    "resized_u4": ({"type": "aal"}, ["resized u4"], 2e-2, 3e-2),
    "q_u8": ({**VECTORS, "tensors": "q"}, ["q u8"], 1e-3, 1e-4),
    "q_u4": ({**VECTORS, "tensors": "q"}, ["q u4"], 2e-2, 1e-2),
    "qk_u8": ({**VECTORS, "tensors": "qk"}, ["q u8", "k u8"], 1e-3, 1e-4),
    "alignment_u8": ({"type": "alignment"}, ["token u8"], 5e-3, 2e-4),
    "tokens_u8": ({"type": "alignment", **TOKENS}, ["tokens u8"], 1e-3, 1e-4),
    "tokens_u4": ({"type": "alignment", **TOKENS}, ["tokens u4"], 2e-2, 1e-2),
    "hard_topk": ({"type": "deit"}, ["topk"], 1e-5, 1e-6),
    "soft_topk": (SOFT, ["topk"], 3e-3, 1e-4),
    # The gradient of |x| is a sign, and near zero rounding turns it.
    "advit_log8": ({"type": "advit", **ROWS}, ["log8"], 2e-2, 5e-2),
    "advit_l2_log8": ({"type": "advit", **ROWS, "distance": "l2"}, ["log8"], 2e-2, 1e-2),
    "q_f16": ({**VECTORS, "tensors": "q"}, ["q f16"], 1e-4, 1e-5),
    "attention_log8": ({"type": "attention", **MAPS}, ["attention log8"], 1e-3, 1e-3),
    "alignment_f16": ({"type": "alignment"}, ["token f16"], 1e-4, 1e-5),
    "seed_f16": ({"type": "seed", "queue": 64}, ["token f16"], 1e-2, 1e-3),
    "guidance_log8": ({"type": "guidance"}, ["log8"], 4e-2, 1e-3),
}


def of_mixed(world, mixed, wanted, **more):
    store, targets = mixed
    recipe = recipe_of(**{name: settings for name, (settings, *_) in wanted.items()})
    ids = {name: [targets[one] for one in several] for name, (_, several, *_) in wanted.items()}
    teachers = {kind: teacher_of(world.weights, kind) for kind in ("cnn", "vit")}
    worst = of_targets(store, world.shards, teachers, recipe, ids, 3, **more)
    assert set(worst) == {"total", *wanted}
    return worst


@pytest.mark.slow
def test_contract_1_every_loss_with_mixing_on_from_several_teachers_in_one_recipe(world, mixed):
    for name, (error, cosine) in of_mixed(world, mixed, EXACT).items():
        assert error <= 1e-5, name
        assert cosine >= 1 - 1e-6, name


def test_contract_1_what_codecs_cost_each_loss_with_mixing_on(world, mixed, record_property):
    worst = of_mixed(world, mixed, CODED, steps=10)  # more than an epoch
    print(worst)
    for name, (_, _, error_bound, cosine_bound) in CODED.items():
        error, cosine = worst[name]
        record_property(name, (error, cosine))
        assert error <= error_bound, name
        assert cosine >= 1 - cosine_bound, name
    store, targets = mixed
    for codec in ("u8", "u4"):
        native, resized = (store.target(targets[name]).codec_errors[codec] for name in (codec, f"resized {codec}"))
        assert native.relative <= resized.relative, "on the maps that a student gets"
        assert native.cosine >= resized.cosine


def test_contract_1_log8_and_topk_are_near_the_exact_distributions(mixed, record_property):
    """Mean KL to what the f32 target keeps; `topk2` keeps two of three classes, so it is exact but for f16."""
    store, targets = mixed
    for coded, exact, bound in (("log8", "rows", 1e-3), ("topk", "logits", 1e-5)):
        near, true = (store.array(targets[name]).compute().astype(np.float64) for name in (coded, exact))
        if coded == "topk":
            near, true = (np.exp(x - np.logaddexp.reduce(x, -1, keepdims=True)) for x in (near, true))
        near = np.maximum(near, 1e-12) / np.maximum(near, 1e-12).sum(-1, keepdims=True)
        kl = float((true * np.log(np.maximum(true, 1e-12) / near)).sum(-1).mean())
        record_property(coded, kl)
        assert 0 <= kl <= bound
        recorded = store.target(targets[coded]).codec_errors
        name = "log8" if coded == "log8" else "topk2"
        assert kl <= 2 * recorded[name].kl + 1e-9, "what was measured on one block is true of all"


@pytest.mark.slow
def test_real_images_and_weights(shared, tmp_path, record_property):
    """MobileNetV2 on CIFAR-10 at 128, under `deit` at 32x32, mixing on."""
    from precompute.teachers import teacher as teachers
    from storage.shards.pack import pack

    shards = pack(str(shared / "data" / "cifar10-test-000000.tar"), str(tmp_path / "some.tar"), fraction=0.1).train
    teacher = teachers.find_teacher(
        "mobilenetv2",
        weights=str(shared / "weights" / "mobilenetv2_100_tf.safetensors"),
        input_size=128,
        arguments={"pad_type": "same"},
        mean=(0.5,),
        std=(0.5,),
    )
    wishes = [f"activations,grid=8,codec={codec}" for codec in ("f32", "f16", "u8", "u4")]
    wishes += [f"activations,grid=8,native=false,codec={codec}" for codec in ("u8", "u4")]
    place = tmp_path / "store"
    targets = run_precompute(place, shards, teacher, wishes, policy=policy("deit", 32))["targets"]
    store = Store.open(tmp_path / "store")
    bounds = [(1e-5, 1e-6), (1e-4, 1e-5), (1e-3, 1e-2), (2e-2, 1e-1), (1e-3, 1e-2), (2e-2, 1e-1)]
    names = ["f32", "f16", "u8", "u4", "resized_u8", "resized_u4"]
    recipe = recipe_of(**{name: {"type": "aal"} for name in names})
    ids = {name: [target] for name, target in zip(names, targets, strict=True)}
    worst = of_targets(store, shards, {teacher.name: teacher}, recipe, ids, 10)
    print(worst)
    for name, (error_bound, cosine_bound) in zip(names, bounds, strict=True):
        error, cosine = worst[name]
        record_property(name, (error, cosine))
        assert error <= error_bound
        assert cosine >= 1 - cosine_bound
