"""The trainer: plain PyTorch with timm's optimisers, schedules and averaging, readable from top to bottom.

Every `checkpoint_interval` steps and at the end of each epoch all is kept in one file; a run that goes on from it
gives, on a CPU, the weights of an undisturbed one, bit for bit. `student/run_dir.py` says what a run leaves.
"""

from __future__ import annotations

import itertools
import json
import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import yaml
from torch import nn

from storage.constants import BLOCK
from storage.errors import UserError, first_line
from storage.objects.atomic import atomic_write
from storage.objects.state_dict import save_state
from storage.progress import NoProgress, Progress, size_text
from student import run_dir
from student.distributed import (
    all_gather_objects,
    all_reduce_mean,
    broadcast_buffers,
    broadcast_object,
    rank,
    world_size,
)
from student.evaluation.accuracy import Score, evaluate
from student.models.card import card
from student.models.files import save_student
from student.models.timm_folder import link_for_timm
from student.training import checkpoint, precision
from student.training.optimizer import build_optimizer, learning_rate, peak_learning_rate
from student.training.setup import TrainConfig, TrainingRun, build_run
from student.training.step import Update

__all__ = ["TrainConfig", "train"]

LOG_EVERY = 50  # steps
SMOKE_STEPS, SMOKE_BLOCKS = 3, 2


@dataclass
class TrainState:
    """How far a run is: an epoch and the steps done in it, the sums of its log so far, and the scores until now."""

    epoch: int = 0
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def train(config: TrainConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Train a student; what came out, as plain data, with None for scores that could not be taken.

    All ranks of a torchrun call it; the first one writes and speaks.

    Args:
        config: recipe, shards, store and the run's folder.
        progress: told how far the run is; None for silence.

    Raises:
        UserError: as its parts do; a loss that is not finite; a folder with another run in it.
        IdentityError: a resumed run that is asked to be another than it was.
    """
    progress = NoProgress() if rank() or progress is None else progress
    found = _found(config)
    precision.check(config.recipe.precision, torch.device(config.device))
    if config.recipe.tensorboard:
        run_dir.board_writer()
    parts = build_run(config, progress, found)
    if found is not None:
        checkpoint.require_same(config.out / run_dir.CHECKPOINT, found, config.recipe, parts.identity)
    if found is not None and found["epoch"] >= config.recipe.optim.epochs and (kept := run_dir.result(config.out)):
        progress.say(f"{config.out}: this run is complete")
        return kept
    run = Trainer(config, parts, progress)
    if found is None:
        run.begin()
    else:
        run.resume(found)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")
        with parts.stream.watched(_fewer(config, parts.stream.workers)):
            run.train()
            return run.finish()


def _fewer(job: TrainConfig, workers: int) -> str:
    """What to do where a loader worker dies."""
    words = f"--set stream.workers={max(0, workers - 1)}{'' if job.smoke else ' --resume'}"
    return f"run the same command again with {words}"


def _found(job: TrainConfig) -> dict[str, Any] | None:
    """The checkpoint to go on from, or None for a new run."""
    path = job.out / run_dir.CHECKPOINT
    if not job.resume:
        if rank() == 0:
            run_dir.require_free(job.out)
        return None
    if run_dir.is_smoke(job.out):
        raise UserError(f"{job.out}: a smoke run lies here, which never goes on; begin anew without --resume")
    if broadcast_object(run_dir.never_kept(job.out) if rank() == 0 else None):  # cut off before its first checkpoint
        return None
    found = checkpoint.read(path)
    checkpoint.require_same(path, found, job.recipe, None)
    return found


class Trainer:
    """A run and everything that its checkpoint holds."""

    def __init__(self, job: TrainConfig, parts: TrainingRun, progress: Progress) -> None:
        self.job, self.parts, self.progress = job, parts, progress
        self.recipe, self.device = job.recipe, torch.device(job.device)
        self.distiller, self.stream, self.average = parts.distiller, parts.stream, parts.average
        self.optimizer, self.scheduler = build_optimizer(self.recipe, self.distiller, self.stream.order.steps)
        self.place = TrainState()
        self.choice: (
            precision.PrecisionChoice
        )  # and the update: of a new run as its recipe says, else as its checkpoint does
        self.update: Update
        self.log = run_dir.Log(None)
        self.epochs = 1 if job.smoke else self.recipe.optim.epochs
        self.steps = min(SMOKE_STEPS, self.stream.order.steps) if job.smoke else self.stream.order.steps
        self.began = time.monotonic()

    # ------------------------------------------------------------------------------------------ beginning

    def begin(self) -> None:
        """A new folder, and generators of this rank's own; precision and kernel are the same on all ranks."""
        if rank():
            torch.manual_seed(self.recipe.seed + 1_000_003 * rank())
        self._compute(broadcast_object(precision.choose(self.recipe.precision, self.device)))
        if rank():
            return
        if run_dir.never_kept(self.job.out):
            self.progress.say(f"{self.job.out}: the run was cut off before its first checkpoint; it begins again")
        run_dir.begin(self.job.out, self.job.smoke)
        (self.job.out / "args.yaml").write_text(yaml.safe_dump(self.recipe.model_dump(mode="json"), sort_keys=False))
        about = {**self.parts.identity, "precision": self.choice.plain()}
        about |= {"ranks": world_size(), "device": str(self.device)}
        counts = {str(label): count for label, count in sorted(self.stream.label_counts.items())}
        run_dir.write_json(self.job.out / run_dir.ABOUT, {**about, "images": counts, "torch": torch.__version__})
        self.log = run_dir.Log(self.job.out, tensorboard=self.recipe.tensorboard)

    def resume(self, found: dict[str, Any]) -> None:
        """Everything as it was when the checkpoint was written."""
        path = self.job.out / run_dir.CHECKPOINT
        try:
            self.distiller.student.load_state_dict(found["student"])
            self.distiller.losses.load_state_dict(found["losses"])
            if self.distiller.copier is not None:
                self.distiller.copier.load_state_dict(found["attention_copy"])
            self.optimizer.load_state_dict(found["optimizer"])
            if self.average is not None:
                self.average.module.load_state_dict(found["average"])
            choice = precision.PrecisionChoice.of(found["precision"])
            self.place = TrainState(found["epoch"], found["step"], found["sums"], found["scores"], found["seconds"])
            place = {"epoch": self.place.epoch, "step": self.place.step}  # of a checkpoint that earlier versions wrote
            self.stream.load_state_dict(found.get("stream") or {**self.stream.state_dict(), **place})
            states = found["rng"]
            if len(states) == world_size():
                checkpoint.set_random_state(states[rank()], self.device)
            else:  # as many generators as ranks: new ones, from the place
                done = self.place.epoch * self.steps + self.place.step
                torch.manual_seed(self.recipe.seed + 1_000_003 * (rank() + world_size() * (done + 1)))
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: does not fit this run: {first_line(error)}") from None
        self._compute(choice)
        if self.update.scaler.is_enabled() and found["scaler"]:
            self.update.scaler.load_state_dict(found["scaler"])
        self.began -= self.place.seconds
        if rank() == 0:
            self.log = run_dir.Log(
                self.job.out,
                found["log_bytes"],
                self.recipe.tensorboard,
                self.place.epoch * self.steps + self.place.step,
            )
        if self.place.epoch < self.epochs:
            self.progress.say(f"goes on in epoch {self.place.epoch} after {self.place.step} of {self.steps} steps")

    def _compute(self, choice: precision.PrecisionChoice) -> None:
        """Compute in the chosen way from now on, on all ranks together."""
        precision.check(self.recipe.precision.model_copy(update={"amp_dtype": choice.amp_dtype}), self.device)
        for line in precision.lines(choice, self.device):
            self.progress.say(line)
        precision.apply(self.distiller, choice)
        if self.recipe.precision.torchcompile:
            precision.compile_student(self.distiller)
        self.choice = choice
        scaled = choice.amp_dtype == "float16"
        self.update = Update(self.recipe, self.distiller, self.optimizer, self.average, self.device, scaled)

    # ------------------------------------------------------------------------------------------ training

    def train(self) -> None:
        """The epochs that are left."""
        count = sum(p.numel() for p in self.distiller.student.parameters())
        order, shared_by = self.stream.order, f" on each of {world_size()} ranks" if world_size() > 1 else ""
        self.progress.say(
            f"{count:,} parameters, {order.samples:,} samples, {order.steps} steps of {order.batch} an epoch, "
            f"lr {peak_learning_rate(self.recipe):g}, on {self.device}{shared_by}, "
            f"reads at most {size_text(self.stream.memory)} ahead"
        )
        if self.job.smoke:
            scored = f" and an evaluation of at most {SMOKE_BLOCKS * BLOCK} samples" if self.parts.val_shards else ""
            self.progress.say(f"a smoke run: {self.steps} step(s){scored}")
        elif self.recipe.optim.warmup_epochs >= self.epochs:
            self.progress.say(
                f"the warm-up takes {self.recipe.optim.warmup_epochs} epochs and the run {self.epochs}: lr never comes "
                "to its peak; lower --set optim.warmup_epochs=N"
            )
        self.progress.start("training", (self.epochs - self.place.epoch) * self.steps - self.place.step)
        for epoch in range(self.place.epoch, self.epochs):
            self._epoch(epoch)
            self._end_of_epoch(epoch)

    def _epoch(self, epoch: int) -> None:
        """The steps of an epoch that are left."""
        self.distiller.train()
        for module in self.parts.still:
            module.eval()
        interval = self.recipe.checkpoint_interval
        first = self.place.step
        self.stream.set_epoch(epoch)
        for step, cpu_batch in enumerate(itertools.islice(self.stream, self.steps - first), first):
            batch = cpu_batch.to(self.device)
            number = epoch * self.stream.order.steps + step
            self.scheduler.step_update(number)
            numbers = self.update(batch, epoch, step)
            for name, value in numbers.items():
                self.place.sums[name] = self.place.sums.get(name, 0.0) + value
            self.place.step = step + 1
            if step % LOG_EVERY == 0:
                numbers = all_reduce_mean(numbers, self.device)
                loss = numbers.pop("loss")
                self.log.write({"epoch": epoch, "step": step, "loss": loss, **_sorted(numbers)}, number)
            if interval and (number + 1) % interval == 0 and step + 1 < self.steps:
                self._keep()
            self.progress.advance(1)

    def _end_of_epoch(self, epoch: int) -> None:
        """Its line in the log, evaluation, weights and checkpoint."""
        student, about, out, scores = self.distiller.student, self.parts.description, self.job.out, self.place.scores
        broadcast_buffers(self.distiller)
        if self.average is not None:
            broadcast_buffers(self.average.module)
        sums = all_reduce_mean(self.place.sums, self.device)
        numbers = {name: total / self.steps for name, total in sums.items() if name != "loss"}
        record = {
            "epoch": epoch, "lr": learning_rate(self.optimizer), **_sorted(numbers),
            "weights": {name: s.weight.at(epoch) for name, s in self.distiller.settings.items()},
        }  # fmt: skip
        text = ", ".join(f"{name.partition('/')[2]} {value:.4g}" for name, value in numbers.items())
        students = {"last": student, **({"ema": self.average.module} if self.average is not None else {})}
        for name, one in students.items():
            if rank() == 0:
                save_student(out / f"{name}.safetensors", one, about)
        due = (epoch + 1) % self.recipe.val_interval == 0 or epoch + 1 == self.epochs
        if self.parts.val_shards and due:
            score = self._score(student)
            scores["last"] = asdict(score)
            record |= {"top1": score.top1, "top5": score.top5, "samples": score.samples}
            text += f"; top-1 {score.top1:.2f} %"
            if self.average is not None:
                ema = self._score(self.average.module)
                scores["ema"] = asdict(ema)
                record |= {"ema_top1": ema.top1, "ema_top5": ema.top5}
                text += f", averaged {ema.top1:.2f} %"
            if "best" not in scores or score.top1 > scores["best"]["top1"]:
                scores["best"] = asdict(score)
                if rank() == 0:
                    save_student(out / "best.safetensors", student, about)
        seconds = round(time.monotonic() - self.began, 2)
        self.log.write({**record, "seconds": seconds}, (epoch + 1) * self.stream.order.steps - 1)  # its last update
        self.progress.say(f"epoch {epoch}: {text}")
        self.place.epoch, self.place.step, self.place.sums = epoch + 1, 0, {}
        self._keep()

    def _score(self, model: nn.Module) -> Score:
        about = self.parts.description
        eager = self.recipe.precision.torchcompile  # batches of other sizes would be compiled anew
        with torch.compiler.set_stance("force_eager") if eager else nullcontext():
            return evaluate(
                model, self.parts.val_shards, about.evaluation_policy, about.mean, about.std,
                device=self.device, rank=rank(), world_size=world_size(),
                max_blocks=SMOKE_BLOCKS if self.job.smoke else None,
            )  # fmt: skip

    # ------------------------------------------------------------------------------------------ keeping

    def _keep(self) -> None:
        """Write the checkpoint; all ranks take part, the first one writes."""
        states = all_gather_objects(checkpoint.random_state(self.device))
        sums = all_reduce_mean(self.place.sums, self.device)
        if rank():
            return
        content = {
            "recipe": self.recipe.model_dump(mode="json"), "identity": self.parts.identity,
            "precision": self.choice.plain(), **asdict(self.place), "sums": sums,
            "seconds": time.monotonic() - self.began, "log_bytes": self.log.sync(),
            "student": self.distiller.student.state_dict(), "losses": self.distiller.losses.state_dict(),
            "optimizer": self.optimizer.state_dict(), "scaler": self.update.scaler.state_dict(),
            "average": self.average.module.state_dict() if self.average is not None else None, "rng": states,
            "attention_copy": self.distiller.copier.state_dict() if self.distiller.copier is not None else None,
            "stream": self.stream.state_dict(),
        }  # fmt: skip
        checkpoint.write(self.job.out / run_dir.CHECKPOINT, content)

    def finish(self) -> dict[str, Any]:
        """What came out, also as a file."""
        out, scores = self.job.out, self.place.scores
        self.log.close()
        seconds = round(time.monotonic() - self.began, 2)
        last, best = (scores.get(name, dict.fromkeys(("top1", "top5", "samples"))) for name in ("last", "best"))
        ema = {"ema_top1": scores["ema"]["top1"], "ema_top5": scores["ema"]["top5"]} if "ema" in scores else {}
        result = {
            "run": str(out), "top1": last["top1"], "top5": last["top5"],
            "best_top1": best["top1"], **ema, "samples": last["samples"],
            "epochs": self.epochs, "steps": self.epochs * self.steps, "targets": self.parts.identity["targets"],
            "bank": self.parts.identity["bank"], "policy": self.parts.identity["policy"],
            "views": self.stream.views, "control": self.parts.identity["control"],
            "precision": self.choice.plain(), "seconds": seconds, "smoke": self.job.smoke,
        }  # fmt: skip
        if rank() == 0:
            extra = self.distiller.learned()
            if extra:
                notes = {
                    n: json.dumps(loss.about) for n, loss in self.distiller.losses.items() if hasattr(loss, "about")
                }
                save_state(out / run_dir.LOSSES, extra, {"format": "pt", **notes})
            if self.job.smoke:
                checkpoint.read(out / run_dir.CHECKPOINT)
                self.progress.say(f"{out}: the smoke run went through; a run may take the same folder")
            teachers = {one.id: one.teacher for given in self.parts.given.values() for one in given}
            text = card(self.parts.description, result, self.parts.identity, self.recipe.model_dump(), teachers)
            with atomic_write(out / run_dir.CARD) as temporary:
                temporary.write_text(text, encoding="utf-8")
            if self.parts.description.plain_timm:
                link_for_timm(out, "last.safetensors", self.parts.description)
            run_dir.write_json(out / run_dir.RESULT, result)
        return result


def _sorted(numbers: dict[str, float]) -> dict[str, dict[str, float]]:
    """`losses/aal` -> {"losses": {"aal": …}}; likewise for notes."""
    found: dict[str, dict[str, float]] = {}
    for name, number in numbers.items():
        kind, _, rest = name.partition("/")
        found.setdefault(kind, {})[rest] = number
    return found
