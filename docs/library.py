"""From shards to a student, in Python: library.py SHARDS VAL TEACHER WEIGHTS OUT."""

import sys
from pathlib import Path

import timm
import torch
from torch.nn import functional as F

from pipeline import load_recipe
from precompute import PrecomputeRequest, find_teacher, parse_target, precompute
from storage import Store, policy
from student import Stream, TrainConfig, evaluate, load_student, train


def main(shards: str, val: str, name: str, weights: str, out: Path) -> None:
    """Precompute a target, read it, and train two networks."""
    # --8<-- [start:precompute]
    request = PrecomputeRequest(
        shards=shards,
        teacher=find_teacher(name, weights=weights),
        targets=parse_target("embedding,codec=f16"),
        policy=policy("deit", size=32),
        num_views=2,
    )
    result = precompute(Store.create(out / "store"), request)
    for failure in result.failures:
        raise SystemExit(failure.error)
    # --8<-- [end:precompute]
    # --8<-- [start:read]
    store = Store.open(out / "store")
    (target,) = store.targets()  # ids, with their manifests
    values = store.array(target)  # a lazy dask array [samples x views, features]
    print(target, *values.shape, f"deviation {values.std().compute():.3f}")
    # --8<-- [end:read]
    # --8<-- [start:stream]
    stream = Stream(shards, store=store, targets=[target], batch_size=32)
    sizes = {"img_size": 32, "patch_size": 4, "depth": 2, "num_classes": values.shape[1]}
    model = timm.create_model("vit_tiny_patch16_224", **sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    for epoch in range(2):
        for batch in stream.epoch(epoch):
            predicted = model(batch.pixels(mean=[0.5] * 3, std=[0.5] * 3))
            loss = F.mse_loss(predicted, batch.target(target))  # what the teacher saw
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: loss {loss.item():.3f}")
    # --8<-- [end:stream]
    # --8<-- [start:train]
    settings = ["optim.epochs=2", "optim.warmup_epochs=0", "stream.batch_size=32"]
    recipe, run = load_recipe("scratch-small", settings), out / "run"
    train(TrainConfig(recipe=recipe, shards=shards, val=val, out=run, store=store))
    student, about = load_student(run / "last.safetensors")
    score = evaluate(student, val, about.evaluation_policy, about.mean, about.std)
    print(f"top-1 {score.top1:.1f} % on {score.samples} samples")
    # --8<-- [end:train]


if __name__ == "__main__":
    main(*sys.argv[1:5], out=Path(sys.argv[5]))
