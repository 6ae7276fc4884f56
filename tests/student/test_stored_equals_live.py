"""Contract 1: training from the store gives what training with the teacher in the loop would give.

At each of 20 steps both losses are evaluated from the same weights, on the same view images: once with the stored
target, once with what the PyTorch teacher says of the batch's images at that moment.
"""

from __future__ import annotations

import pytest
import torch

from precompute.export import live_teacher
from precompute.taps import Tap
from storage.store import Store
from student.config import Recipe, validate
from student.lesson import Lesson
from student.model import build
from student.stream import Batch, Stream
from tests.conftest import World, run_precompute, teacher_of

STEPS = 20


def recipe_of(**aal) -> Recipe:
    return validate(
        {
            "student": {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 3},
            "losses": {"crossentropy": {"smoothing": 0.1}, "aal": aal},
            "stream": {"batch_size": 32},
        },
        "test",
    )


def compare(stream: Stream, target: str, manifest: dict, teacher: torch.nn.Module, recipe: Recipe, classes: int):
    """Largest relative loss error and smallest gradient cosine over the steps, for the total and for AAL alone."""
    torch.manual_seed(0)
    model, _ = build(recipe.student, classes)
    lesson = Lesson(recipe, model, {"aal": manifest}, recipe.student.mean, recipe.student.std)
    optimizer = torch.optim.AdamW(lesson.parameters(), 1e-3)
    worst = {"total": (0.0, 1.0), "aal": (0.0, 1.0)}
    step = 0
    while step < STEPS:
        for batch in stream.epoch(step // stream.order.steps):
            with torch.no_grad():
                (now,) = teacher(batch.images)
            live = Batch(batch.images, batch.labels, batch.ids, {target: {"data": now}}, {target: "f32"})
            for name in worst:
                losses, gradients = [], []
                for source in (live, batch):
                    _, values = lesson(source)
                    loss = lesson.total(values, 0) if name == "total" else values["aal"]
                    optimizer.zero_grad()
                    loss.backward()
                    flat = [p.grad.flatten() for p in lesson.parameters() if p.grad is not None]
                    losses.append(loss.item())
                    gradients.append(torch.cat(flat).double())
                error = abs(losses[1] - losses[0]) / abs(losses[0])
                cosine = torch.nn.functional.cosine_similarity(*gradients, dim=0).item()
                worst[name] = (max(worst[name][0], error), min(worst[name][1], cosine))
            _, values = lesson(batch)
            optimizer.zero_grad()
            lesson.total(values, 0).backward()
            optimizer.step()
            step += 1
            if step == STEPS:
                break
    return worst


def of_world(world: World, codec: str, **aal):
    store, target = Store.open(world.store), world.targets[f"activations {codec}"]
    teacher = live_teacher(teacher_of(world.weights, "cnn"), [Tap("activations", grid=8)], 32)
    stream = Stream(world.shards, batch=32, store=store, targets=[target], seed=1)
    return compare(stream, target, store.target(target), teacher, recipe_of(**aal), 3)


@pytest.mark.parametrize("reading", ["mse", "norm", "sq"])
def test_aal_from_an_f32_store_equals_aal_with_the_teacher_in_the_loop(world, reading):
    for error, cosine in of_world(world, "f32", loss=reading).values():
        assert error <= 1e-5
        assert cosine >= 1 - 1e-6


def test_aal_from_u8_stays_close_to_the_teacher_in_the_loop(world, record_property):
    worst = of_world(world, "u8")
    for name, (error, cosine) in worst.items():
        record_property(name, (error, cosine))
        assert 0 < error <= 1e-3
        assert 1 - 1e-3 <= cosine < 1


def test_real_images_and_weights(shared, tmp_path, record_property):
    """MobileNetV2 on CIFAR-10 at 128, under `light` at 32x32, as the README runs it."""
    from precompute import teachers
    from storage.pack import pack

    shards = pack(str(shared / "data" / "cifar10-test-000000.tar"), str(tmp_path / "some.tar"), fraction=0.1)["train"]
    teacher = teachers.find(
        "mobilenetv2", weights=str(shared / "weights" / "mobilenetv2_100_tf.safetensors"), input_size=128,
        arguments={"pad_type": "same"}, mean=(0.5,), std=(0.5,),
    )  # fmt: skip
    wishes = ["activations,grid=8,codec=f32", "activations,grid=8,codec=u8"]
    exact, coded = run_precompute(tmp_path / "store", shards, teacher, wishes)["targets"]
    store = Store.open(tmp_path / "store")
    live = live_teacher(teacher, [Tap("activations", grid=8)], 32)
    for target, error_bound, cosine_bound in ((exact, 1e-5, 1e-6), (coded, 1e-3, 1e-2)):
        stream = Stream(shards, batch=32, store=store, targets=[target])
        worst = compare(stream, target, store.target(target), live, recipe_of(), 10)
        record_property(target, worst)
        print(target, worst)
        for error, cosine in worst.values():
            assert error <= error_bound
            assert cosine >= 1 - cosine_bound
