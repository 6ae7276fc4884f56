"""The trainer: plain PyTorch with timm's optimiser and schedule, readable from top to bottom.

A run leaves in its folder: `args.yaml` (the whole recipe), `log.jsonl` (a line a stretch of steps and a line an epoch),
`best.safetensors` and `last.safetensors` (timm state dicts), and `losses.safetensors` (links and the like).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from storage.errors import IdentityError, UserError, nearest
from storage.policies import Policy, policy
from storage.progress import Progress
from storage.shards import ShardIndex, cached_index, classes_of, expand, require_labels
from storage.store import Store
from student.align import table
from student.config import Recipe
from student.evaluate import Score, evaluate
from student.lesson import Lesson, find_targets
from student.model import Description, build, input_size, save
from student.stream import Stream

LOG_EVERY = 50  # steps


@dataclass(frozen=True)
class Job:
    """What a training run is asked for."""

    recipe: Recipe
    shards: Sequence[str]
    val: Sequence[str]
    out: Path
    store: Store | None = None
    device: str = "cpu"


def train(job: Job, progress: Progress) -> dict[str, Any]:
    """Train a student; what came out, as plain data.

    Raises:
        UserError: as its parts do; a loss that is not finite.
    """
    recipe, device = job.recipe, torch.device(job.device)
    if job.out.exists() and any(job.out.iterdir()):
        raise UserError(f"{job.out}: there is a run in this folder already; give a new one")
    torch.manual_seed(recipe.seed)
    urls, val_urls = expand(job.shards), expand(job.val)
    classes, count = _classes(urls, val_urls, recipe)
    model, arguments = build(recipe.student, count)
    size = input_size(model, recipe.student)
    stream, lesson = _prepare(job, urls, model, size, progress)
    index_of = _indexes(job.store)
    for url in (*urls, *val_urls):
        _check_labels(url, index_of(url) if url in urls else cached_index(url), count)
    lesson.to(device)
    optimizer, scheduler, lr = _optimizer(recipe, lesson, stream.order.steps)
    evaluation = stream.source.policy.evaluation
    description = Description(
        recipe.student.model, arguments, size, recipe.student.mean, recipe.student.std, classes, evaluation.line
    )
    progress.say(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {stream.order.samples:,} samples, "
        f"{stream.order.steps} steps of {stream.order.batch} an epoch, lr {lr:g}, on {device}, "
        f"lanes hold at most {stream.memory / 2**20:.0f} MiB"
    )
    job.out.mkdir(parents=True, exist_ok=True)
    (job.out / "args.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    best = Score(-1.0, None, 0)
    score = best
    began = time.monotonic()
    with (job.out / "log.jsonl").open("w") as log:
        progress.start("training", recipe.optim.epochs * stream.order.steps)
        for epoch in range(recipe.optim.epochs):
            losses = _epoch(lesson, stream, optimizer, scheduler, epoch, recipe, device, log, progress)
            record = {
                "epoch": epoch, "lr": optimizer.param_groups[0]["lr"], "losses": losses,
                "weights": {name: s.weight.at(epoch) for name, s in lesson.settings.items()},
            }  # fmt: skip
            text = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
            save(job.out / "last.safetensors", model, description)
            if (epoch + 1) % recipe.val_interval == 0 or epoch + 1 == recipe.optim.epochs:
                score = evaluate(
                    model,
                    val_urls,
                    policy(evaluation.line, size),
                    recipe.student.mean,
                    recipe.student.std,
                    device=device,
                )
                record |= {"top1": score.top1, "top5": score.top5, "samples": score.samples}
                text += f"; top-1 {score.top1:.2f} %"
                if score.top1 > best.top1:
                    best = score
                    save(job.out / "best.safetensors", model, description)
            _write(log, {**record, "seconds": round(time.monotonic() - began, 2)})
            progress.say(f"epoch {epoch}: {text}")
    extra = {name: tensor.detach().cpu() for name, tensor in lesson.losses.state_dict().items()}
    if extra:
        save_file(extra, job.out / "losses.safetensors")
    return {
        "run": str(job.out), "top1": score.top1, "top5": score.top5, "best_top1": best.top1, "samples": score.samples,
        "epochs": recipe.optim.epochs, "steps": recipe.optim.epochs * stream.order.steps,
        "targets": lesson.targets, "bank": stream.source.bank, "policy": stream.source.policy.line,
        "views": stream.views, "seconds": round(time.monotonic() - began, 2),
    }  # fmt: skip


def _prepare(job: Job, urls: list[str], model: nn.Module, size: int, progress: Progress) -> tuple[Stream, Lesson]:
    """The stream and the lesson, and a word on what was chosen."""
    recipe, settings = job.recipe, job.recipe.stream
    shard_ids = []
    if job.store is not None:
        known = job.store.shard_ids()
        shard_ids = [job.store.require(url, known).id for url in urls]
    bank, manifests = find_targets(job.store, shard_ids, recipe, model)
    fresh: Policy | None = None
    if bank is None:
        wish = settings.bank
        if wish.id is not None or settings.views is not None:
            raise UserError("stream.bank and stream.views speak of a store's bank: give --store DIR")
        fresh = policy(wish.policy or "light", wish.size or size, wish.seed if wish.seed is not None else recipe.seed)
    memory = int(settings.memory * 2**30) if settings.memory else None
    stream = Stream(
        urls, batch=settings.batch_size, store=job.store, targets=[m["id"] for m in manifests.values()], policy=fresh,
        bank=bank, views=settings.views, seed=recipe.seed, lanes=settings.lanes, window=settings.window,
        workers=settings.workers, memory=memory,
    )  # fmt: skip
    if stream.source.policy.size != size:
        raise IdentityError(
            f"bank {bank or 'of fresh views'}", "view size", f"{size}, the student's img_size",
            stream.source.policy.size, "Give the student the bank's size: --set student.img_size=N",
        )  # fmt: skip
    if bank is None:
        progress.say(f"views: fresh, {stream.source.policy.line}, size {size}, seed {stream.source.policy.seed}")
    else:
        progress.say(f"views: bank {bank} ({stream.source.policy.line}), {stream.views} view(s)")
    for notice in stream.notices:
        progress.say(notice)
    lesson = Lesson(recipe, model, manifests, recipe.student.mean, recipe.student.std)
    if lesson.rows:
        progress.say(table(lesson.rows))
    return stream, lesson


def _classes(urls: list[str], val_urls: list[str], recipe: Recipe) -> tuple[tuple[str, ...] | None, int]:
    """The class names and how many there are; never guessed from labels."""
    names, val_names = classes_of(urls), classes_of(val_urls)
    if names and val_names and names != val_names:
        raise IdentityError("classes.json of the validation shards", "classes", names, val_names)
    wanted = recipe.student.num_classes
    names = names or val_names
    if names is None and wanted is None:
        raise UserError(
            f"{urls[0]}: no classes.json beside it, so the number of classes is not known; "
            "say it: --set student.num_classes=N"
        )
    if names is not None and wanted not in (None, len(names)):
        raise IdentityError(f"{urls[0]}: classes.json", "student.num_classes", len(names), wanted)
    return (tuple(names) if names else None), int(wanted or len(names or ()))


def _indexes(store: Store | None) -> Callable[[str], ShardIndex]:
    if store is None:
        return cached_index
    known = store.shard_ids()
    return lambda url: store.require(url, known)


def _check_labels(url: str, index: ShardIndex, count: int) -> None:
    require_labels(url, index)
    highest = max(label for label in index.labels if label is not None)
    if highest >= count:
        key = index.keys[index.labels.index(highest)]
        raise UserError(f"{url}: key {key!r} has label {highest}, the student has classes 0 to {count - 1}")


def _optimizer(recipe: Recipe, lesson: Lesson, steps: int) -> tuple[torch.optim.Optimizer, Any, float]:
    """timm's optimiser, without decay for biases, norms and embeddings; its schedule by updates; and the peak rate."""
    from timm.optim import (  # after precompute.taps made it importable
        create_optimizer_v2,
        list_optimizers,
        param_groups_weight_decay,
    )
    from timm.scheduler import create_scheduler_v2

    settings = recipe.optim
    lr = settings.lr or settings.lr_base * recipe.stream.batch_size / settings.lr_base_size
    skip = {f"student.{name}" for name in getattr(lesson.student, "no_weight_decay", set)()}
    groups = param_groups_weight_decay(lesson, settings.weight_decay, skip)
    try:
        optimizer = create_optimizer_v2(groups, opt=settings.opt, lr=lr, weight_decay=settings.weight_decay)
    except (ValueError, AssertionError, RuntimeError) as error:
        raise UserError(
            f"optim.opt: {str(error) or settings.opt}. {nearest(settings.opt, list_optimizers())}"
        ) from None
    scheduler, _ = create_scheduler_v2(
        optimizer, settings.sched, num_epochs=settings.epochs, warmup_epochs=settings.warmup_epochs,
        warmup_lr=settings.warmup_lr, min_lr=settings.min_lr, step_on_epochs=False, updates_per_epoch=steps,
    )  # fmt: skip
    return optimizer, scheduler, lr


def _epoch(
    lesson: Lesson,
    stream: Stream,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    epoch: int,
    recipe: Recipe,
    device: torch.device,
    log: IO[str],
    progress: Progress,
) -> dict[str, float]:
    """One epoch; loss -> its mean over the steps."""
    lesson.train()
    sums: dict[str, float] = {}
    for step, cpu_batch in enumerate(stream.epoch(epoch)):
        update = epoch * stream.order.steps + step
        scheduler.step_update(update)
        _, values = lesson(cpu_batch.to(device))
        loss = lesson.total(values, epoch)
        if not math.isfinite(loss.item()):
            parts = ", ".join(f"{name} {value.item():g}" for name, value in values.items())
            raise UserError(
                f"epoch {epoch}, step {step}: the loss is not finite ({parts}); lower --set optim.lr or set "
                "optim.clip_grad=1"
            )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if recipe.optim.clip_grad:
            nn.utils.clip_grad_norm_(lesson.parameters(), recipe.optim.clip_grad)
        optimizer.step()
        numbers = {name: value.item() for name, value in values.items()}
        for name, number in numbers.items():
            sums[name] = sums.get(name, 0.0) + number
        if step % LOG_EVERY == 0:
            _write(log, {"epoch": epoch, "step": step, "loss": loss.item(), "losses": numbers})
        progress.advance(1)
    return {name: total / stream.order.steps for name, total in sums.items()}


def _write(log: IO[str], record: dict[str, Any]) -> None:
    log.write(json.dumps(record) + "\n")
    log.flush()
