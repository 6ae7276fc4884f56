"""The trainer: plain PyTorch with timm's optimizers, schedules and averaging, readable from top to bottom.

Every `checkpoint_interval` steps and at the end of each epoch the whole state is saved in one file. A run resumed
from it ends, on a CPU, with the weights of an undisturbed run, bit for bit. `student/run_dir.py` lists its files.
"""

from __future__ import annotations

import itertools
import json
import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import nn

from storage.constants import BLOCK
from storage.errors import UserError, first_line, setting
from storage.objects.atomic import atomic_write
from storage.objects.state_dict import save_state
from storage.progress import NoProgress, Progress, size_text
from student import run_dir
from student.distributed import all_reduce_mean, broadcast_buffers, broadcast_object, rank, world_size
from student.evaluation.accuracy import Score, evaluate
from student.models.card import card
from student.models.files import save_student
from student.models.outside_timm import keep_source
from student.models.timm_folder import link_for_timm
from student.training import checkpoint, precision
from student.training.optimizer import build_optimizer, learning_rate, load_optimizer, peak_learning_rate
from student.training.prefetch import batches_on_device
from student.training.setup import TrainConfig, TrainingRun, build_run
from student.training.step import Update
from student.training.step_record import StepRecord

if TYPE_CHECKING:
    from student.run_dir import TrainResult

__all__ = ["TrainConfig", "train"]

LOG_EVERY, FETCH_EVERY = 50, 10  # steps: between lines of the log; at most, until losses are read and checked
SMOKE_STEPS, SMOKE_BLOCKS = 3, 2


@dataclass
class TrainState:
    """Progress of a run: the epoch, steps done in it, sums of logged values in it, scores so far, seconds."""

    epoch: int = 0
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def train(config: TrainConfig, progress: Progress | None = None) -> TrainResult:
    """Train a student.

    All ranks of a torchrun call it; rank 0 writes and reports.

    Args:
        config: recipe, shards, store and the run's folder.
        progress: told how far the run is; None for silence.

    Raises:
        UserError: as its parts do; a loss that is not finite; a folder with another run in it.
        IdentityError: a resumed run with other settings than it had.
    """
    progress = NoProgress() if rank() or progress is None else progress
    saved = _saved(config)
    precision.check(config.recipe.precision, torch.device(config.device))
    if config.recipe.tensorboard:
        run_dir.board_writer()
    run = build_run(config, progress, saved)
    if saved is not None:
        checkpoint.require_same(config.out / run_dir.CHECKPOINT, saved, config.recipe, run.identity)
    if saved is not None and saved["epoch"] >= config.recipe.optim.epochs and (result := run_dir.result(config.out)):
        progress.say(f"{config.out}: this run is complete")
        return result
    trainer = Trainer(config, run, progress)
    if saved is None:
        trainer.begin()
    else:
        trainer.resume(saved)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")
        with run.stream.watched(_with_fewer_workers(config, run.stream.workers)):
            trainer.train()
            return trainer.finish()


def _with_fewer_workers(config: TrainConfig, workers: int) -> str:
    """What to do where a loader worker dies."""
    fewer = setting("stream.workers", max(0, workers - 1))
    return f"run the same command again with {fewer}{'' if config.smoke else ' ' + setting('resume', True)}"


def _saved(config: TrainConfig) -> dict[str, Any] | None:
    """Content of the checkpoint to resume from; None for a new run."""
    path = config.out / run_dir.CHECKPOINT
    if not config.resume:
        if rank() == 0:
            run_dir.require_free(config.out)
        return None
    if run_dir.is_smoke(config.out):
        hint = f"Begin a new run, without {setting('resume', True)}"
        raise UserError(f"{config.out}: a smoke run lies here, which cannot be resumed", hint=hint)
    if broadcast_object(run_dir.never_kept(config.out) if rank() == 0 else None):  # cut off before its first checkpoint
        return None
    saved = checkpoint.read(path)
    checkpoint.require_same(path, saved, config.recipe, None)
    return saved


class Trainer:
    """Trains, logs, evaluates and saves one run."""

    def __init__(self, config: TrainConfig, run: TrainingRun, progress: Progress) -> None:
        self.config, self.run, self.progress = config, run, progress
        self.recipe, self.device = config.recipe, torch.device(config.device)
        self.distiller, self.stream, self.average = run.distiller, run.stream, run.average
        self.optimizer, self.scheduler = build_optimizer(self.recipe, self.distiller, self.stream.order.steps)
        self.state, self.record = TrainState(), StepRecord(FETCH_EVERY)
        self.precision: precision.PrecisionChoice  # begin or resume sets it, and the update
        self.update: Update
        self.log = run_dir.Log(None)
        self.epochs = 1 if config.smoke else self.recipe.optim.epochs
        self.steps = min(SMOKE_STEPS, self.stream.order.steps) if config.smoke else self.stream.order.steps
        self.started = time.monotonic()

    # ------------------------------------------------------------------------------------------ beginning

    def begin(self) -> None:
        """A new folder, and generators of this rank's own; precision and kernel are the same on all ranks."""
        if rank():
            torch.manual_seed(self.recipe.seed + 1_000_003 * rank())
        self._compute(broadcast_object(precision.choose(self.recipe.precision, self.device)))
        if rank():
            return
        if run_dir.never_kept(self.config.out):
            self.progress.say(f"{self.config.out}: the run was cut off before its first checkpoint; it begins again")
        run_dir.begin(self.config.out, self.config.smoke)
        (self.config.out / "args.yaml").write_text(yaml.safe_dump(self.recipe.model_dump(mode="json"), sort_keys=False))
        if kept := keep_source(self.run.description.model, self.config.out / run_dir.NETWORK):
            self.progress.say(kept)
        about = {**self.run.identity, "precision": asdict(self.precision)}
        about |= {"ranks": world_size(), "device": str(self.device)}
        counts = {str(label): count for label, count in sorted(self.stream.label_counts.items())}
        run_dir.write_json(self.config.out / run_dir.ABOUT, {**about, "images": counts, "torch": torch.__version__})
        self.log = run_dir.Log(self.config.out, tensorboard=self.recipe.tensorboard)

    def _parts(self) -> dict[str, Any]:
        """Name in a checkpoint -> what is saved there by its state dict, apart from the stream and the scaler."""
        distiller, average = self.distiller, self.average and self.average.module
        parts: dict[str, Any] = {"student": distiller.student, "losses": distiller.losses, "optimizer": self.optimizer}
        parts |= {"average": average, "attention_copy": distiller.copier}
        return {name: part for name, part in parts.items() if part is not None}

    def resume(self, saved: dict[str, Any]) -> None:
        """Restore everything that a checkpoint holds."""
        path = self.config.out / run_dir.CHECKPOINT
        try:
            for name, part in self._parts().items():
                if part is self.optimizer:
                    load_optimizer(self.optimizer, saved[name])
                else:
                    part.load_state_dict(saved[name])
            choice = precision.PrecisionChoice(saved["precision"]["amp_dtype"], saved["precision"]["fused_attn"])
            self.state = TrainState(saved["epoch"], saved["step"], saved["sums"], saved["scores"], saved["seconds"])
            position = {"epoch": self.state.epoch, "step": self.state.step}  # earlier versions kept no stream state
            self.stream.load_state_dict(saved.get("stream") or {**self.stream.state_dict(), **position})
            done, states = self.state.epoch * self.steps + self.state.step, saved["rng"]
            if len(states) == world_size():
                checkpoint.set_random_state(states[rank()], self.device)
            else:  # another number of ranks: new generators, seeded by the step
                torch.manual_seed(self.recipe.seed + 1_000_003 * (rank() + world_size() * (done + 1)))
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: does not fit this run: {first_line(error)}") from None
        self._compute(choice)
        if self.update.scaler.is_enabled() and saved["scaler"]:
            self.update.scaler.load_state_dict(saved["scaler"])
        self.started -= self.state.seconds
        if rank() == 0:
            self.log = run_dir.Log(self.config.out, saved["log_bytes"], self.recipe.tensorboard, done)
        if self.state.epoch < self.epochs:
            self.progress.say(f"goes on in epoch {self.state.epoch} after {self.state.step} of {self.steps} steps")

    def _compute(self, choice: precision.PrecisionChoice) -> None:
        """Compute with this precision and kernel from now on, the same on all ranks."""
        precision.check(self.recipe.precision.model_copy(update={"amp_dtype": choice.amp_dtype}), self.device)
        for line in precision.lines(choice, self.device):
            self.progress.say(line)
        precision.apply(self.distiller, choice)
        if self.recipe.precision.torchcompile:
            precision.compile_student(self.distiller)
        self.precision = choice
        scaled = choice.amp_dtype == "float16"
        self.update = Update(
            self.recipe, self.distiller, self.optimizer, average=self.average, device=self.device, scaled=scaled
        )

    # ------------------------------------------------------------------------------------------ training

    def train(self) -> None:
        """Train the remaining epochs."""
        count = sum(p.numel() for p in self.distiller.student.parameters())
        order, shared_by = self.stream.order, f" on each of {world_size()} ranks" if world_size() > 1 else ""
        self.progress.say(
            f"{count:,} parameters, {order.samples:,} samples, {order.steps} steps of {order.batch_size} an epoch, "
            f"lr {peak_learning_rate(self.recipe):g}, on {self.device}{shared_by}, "
            f"reads at most {size_text(self.stream.memory)} ahead"
        )
        if self.config.smoke:
            scored = f" and an evaluation of at most {SMOKE_BLOCKS * BLOCK} samples" if self.run.val_shards else ""
            self.progress.say(f"a smoke run: {self.steps} step(s){scored}")
        elif (warmup := self.recipe.optim.warmup_epochs) >= self.epochs:
            lower = f"lr never reaches its peak; lower {setting('optim.warmup_epochs', 'N')}"
            self.progress.say(f"the warm-up takes {warmup} epochs and the run {self.epochs}: {lower}")
        self.progress.start("training", (self.epochs - self.state.epoch) * self.steps - self.state.step)
        for epoch in range(self.state.epoch, self.epochs):
            self._epoch(epoch)
            self._end_of_epoch(epoch)

    def _epoch(self, epoch: int) -> None:
        """Train the remaining steps of an epoch."""
        self.distiller.train()
        for module in self.run.frozen_norms:
            module.eval()
        interval, first = self.recipe.checkpoint_interval, self.state.step
        self.stream.set_epoch(epoch)
        remaining = itertools.islice(self.stream, self.steps - first)
        for step, batch in enumerate(batches_on_device(remaining, self.device), first):
            if self.record.full:  # here, where the next batch is on its way already
                self._fetch()
            number = epoch * self.stream.order.steps + step
            self.scheduler.step_update(number)
            self.record.add(self.update(batch, epoch, step))
            self.state.step = step + 1
            if step % LOG_EVERY == 0:
                numbers = all_reduce_mean(self._fetch(), self.device)
                loss = numbers.pop("loss")
                self.log.write({"epoch": epoch, "step": step, "loss": loss, **_by_kind(numbers)}, number)
            if interval and (number + 1) % interval == 0 and step + 1 < self.steps:
                self._save_checkpoint()
            self.progress.advance(1)

    def _fetch(self) -> dict[str, float]:
        """Add what the steps since the last call gave to the sums; the numbers of the last of them.

        Called before anything is written. Raises UserError for a loss that is not finite.
        """
        numbers: dict[str, float] = {}
        for numbers in self.record.fetch():
            for name, value in numbers.items():
                self.state.sums[name] = self.state.sums.get(name, 0.0) + value
        return numbers

    def _end_of_epoch(self, epoch: int) -> None:
        """Save weights, evaluate, log and save a checkpoint."""
        self._fetch()
        scores, students = self.state.scores, {"last": self.distiller.student}
        broadcast_buffers(self.distiller)
        if self.average is not None:
            broadcast_buffers(self.average.module)
            students["ema"] = self.average.module
        sums = all_reduce_mean(self.state.sums, self.device)
        numbers = {name: total / self.steps for name, total in sums.items() if name != "loss"}
        record = {
            "epoch": epoch,
            "lr": learning_rate(self.optimizer),
            **_by_kind(numbers),
            "weights": {name: loss.weight.at(epoch) for name, loss in self.distiller.configs.items()},
        }
        text = ", ".join(f"{name.partition('/')[2]} {value:.4g}" for name, value in numbers.items())
        for name, student in students.items():
            self._save_student(name, student)
        due = (epoch + 1) % self.recipe.val_interval == 0 or epoch + 1 == self.epochs
        if self.run.val_shards and due:
            scores |= {name: asdict(self._score(student)) for name, student in students.items()}
            last = scores["last"]
            record |= last
            text += f"; top-1 {last['top1']:.2f} %"
            if ema := scores.get("ema"):
                record |= {"ema_top1": ema["top1"], "ema_top5": ema["top5"]}
                text += f", averaged {ema['top1']:.2f} %"
            if "best" not in scores or last["top1"] > scores["best"]["top1"]:
                scores["best"] = last
                self._save_student("best", self.distiller.student)
        seconds = round(time.monotonic() - self.started, 2)
        self.log.write({**record, "seconds": seconds}, (epoch + 1) * self.stream.order.steps - 1)  # its last update
        self.progress.say(f"epoch {epoch}: {text}")
        self.state.epoch, self.state.step, self.state.sums = epoch + 1, 0, {}
        self._save_checkpoint()

    def _score(self, model: nn.Module) -> Score:
        description = self.run.description
        eager = self.recipe.precision.torchcompile  # batches of other sizes would be compiled again
        with torch.compiler.set_stance("force_eager") if eager else nullcontext():
            return evaluate(
                model,
                self.run.val_shards,
                description.evaluation_policy,
                description.mean,
                description.std,
                device=self.device,
                rank=rank(),
                world_size=world_size(),
                max_blocks=SMOKE_BLOCKS if self.config.smoke else None,
            )

    # ------------------------------------------------------------------------------------------ saving

    def _save_student(self, name: str, student: nn.Module) -> None:
        if rank() == 0:
            save_student(self.config.out / f"{name}.safetensors", student, self.run.description)

    def _save_checkpoint(self) -> None:
        """Write the checkpoint; all ranks take part, rank 0 writes."""
        self._fetch()
        states = checkpoint.random_states(self.device)
        sums = all_reduce_mean(self.state.sums, self.device)
        if rank():
            return
        content = {
            "recipe": self.recipe.model_dump(mode="json"),
            "identity": self.run.identity,
            "precision": asdict(self.precision),
            **asdict(self.state),
            "sums": sums,
            "seconds": time.monotonic() - self.started,
            "log_bytes": self.log.sync(),
            "scaler": self.update.scaler.state_dict(),
            "rng": states,
            "stream": self.stream.state_dict(),
            **dict.fromkeys(("average", "attention_copy")),
            **{name: part.state_dict() for name, part in self._parts().items()},
        }
        checkpoint.write(self.config.out / run_dir.CHECKPOINT, content)

    def finish(self) -> TrainResult:
        """The result, also written as a file."""
        out, scores, identity = self.config.out, self.state.scores, self.run.identity
        self.log.close()
        last, best = (scores.get(name, dict.fromkeys(("top1", "top5", "samples"))) for name in ("last", "best"))
        result: TrainResult = {
            "run": str(out),
            "top1": last["top1"],
            "top5": last["top5"],
            "best_top1": best["top1"],
            "samples": last["samples"],
            "epochs": self.epochs,
            "steps": self.epochs * self.steps,
            "targets": identity["targets"],
            "bank": identity["bank"],
            "policy": identity["policy"],
            "views": identity["views"],
            "control": identity["control"],
            "precision": asdict(self.precision),
            "seconds": round(time.monotonic() - self.started, 2),
            "smoke": self.config.smoke,
        }
        if "ema" in scores:
            result |= {"ema_top1": scores["ema"]["top1"], "ema_top5": scores["ema"]["top5"]}
        if rank() == 0:
            if learned := self.distiller.learned():
                terms = self.distiller.terms.items()
                metadata = {name: json.dumps(loss.metadata) for name, loss in terms if loss.metadata is not None}
                save_state(out / run_dir.LOSSES, learned, {"format": "pt", **metadata})
            if self.config.smoke:
                checkpoint.read(out / run_dir.CHECKPOINT)
                self.progress.say(f"{out}: the smoke run went through; a run may take the same folder")
            teachers = {stored.id: stored.teacher for targets in self.distiller.targets.values() for stored in targets}
            text = card(self.run.description, result, identity, self.recipe.model_dump(), teachers)
            with atomic_write(out / run_dir.CARD) as temporary:
                temporary.write_text(text, encoding="utf-8")
            if self.run.description.plain_timm:
                link_for_timm(out, run_dir.LAST, self.run.description)
            run_dir.write_json(out / run_dir.RESULT, result)
        return result


def _by_kind(numbers: dict[str, float]) -> dict[str, dict[str, float]]:
    """`losses/aal` -> {"losses": {"aal": …}}; `metrics/…` -> {"metrics": …}."""
    by_kind: dict[str, dict[str, float]] = {}
    for name, number in numbers.items():
        kind, _, rest = name.partition("/")
        by_kind.setdefault(kind, {})[rest] = number
    return by_kind
