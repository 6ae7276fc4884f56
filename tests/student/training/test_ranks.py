"""Several ranks: the losses of one, exact evaluation, one voice, and a run that goes on with another number of them."""

from __future__ import annotations

import dataclasses
import os
import socket
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from torch.multiprocessing.spawn import spawn

from storage.shards.shard import Shard, open_shards
from storage.testing import synthetic_shards
from storage.views.policy import policy
from student.distributed import process_group
from student.evaluation.accuracy import count, evaluate
from student.evaluation.batches import evaluation_batches
from student.models.build import build_student
from student.recipe.validate import validate
from student.training import checkpoint
from student.training import train as trainer
from student.training.step import Update
from tests.conftest import HANGS, ROOT, Quiet
from tests.student.runs import command, job, log, run, start, u8, weights

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]


def _rank(number: int, ranks: int, port: int, work, arguments) -> None:
    os.environ |= {
        "RANK": str(number),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(number),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    with process_group("cpu"):
        work(number, ranks, *arguments)


def together(ranks: int, work, *arguments) -> None:
    """Run some work on ranks of their own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(_rank, (ranks, port, work, arguments), nprocs=ranks)


def _train(number: int, ranks: int, jobs: list[trainer.TrainConfig], urls: list[str], out: Path) -> None:
    trainer.LOG_EVERY = 1
    for one in jobs:
        trainer.train(one, Quiet())
    score = evaluate(
        _model(), urls, policy("eval", 32), (0.5,) * 3, (0.5,) * 3, batch_size=96, rank=number, world_size=ranks
    )
    (out / f"score-{number}").write_text(repr(score))


def _model() -> torch.nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
    torch.manual_seed(5)
    return build_student(validate({"student": sizes, "losses": {"crossentropy": {}}}, "r").student, 7)[0].eval()


SETTINGS = ["optim.epochs=3", "optim.clip_grad=1", "model_ema_decay=0.9", "optim.opt=momentum", "optim.lr=0.01"]


@pytest.fixture(scope="module")
def pair(world, tmp_path_factory):
    """AAL by two ranks, in the folder `two`, and what they say of the score of a student, on shards of unequal size."""
    folder = tmp_path_factory.mktemp("ranks")
    urls = synthetic_shards(folder / "odd", shards=3, samples=131, classes=7)
    together(2, _train, [job(world, folder / "two", "aal", u8(world), *SETTINGS)], urls, folder)
    return folder


@pytest.fixture(scope="module")
def others(world, pair):
    """AAL over 20 steps and more by one rank, by two in pieces, and by one that two go on with, beside that of two."""
    folder = pair
    jobs = {"one": job(world, folder / "one", "aal", u8(world), *SETTINGS)}
    jobs["pieces"] = job(world, folder / "pieces", "aal", u8(world), *SETTINGS, "optim.grad_accum_steps=2")
    jobs["both"] = job(world, folder / "both", "aal", u8(world), *SETTINGS, "checkpoint_interval=5")
    original = Update.__call__

    def cut(self, batch, epoch, step):
        if (epoch, step) == (1, 7):
            raise KeyboardInterrupt
        return original(self, batch, epoch, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "LOG_EVERY", 1)
        trainer.train(jobs["one"], Quiet())
        patch.setattr(Update, "__call__", cut)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(jobs["both"], Quiet())
    resumed = dataclasses.replace(jobs["both"], resume=True)
    together(
        2, _train, [jobs["pieces"], resumed], [str(path) for path in sorted((folder / "odd").glob("*.tar"))], folder
    )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("other", ["two", "pieces", "both"])
def test_two_ranks_give_the_losses_of_one(others, other):
    one, two = log(others / "one"), log(others / other)
    assert len(one) == len(two) == 30
    for number, (ours, theirs) in enumerate(zip(one, two, strict=True)):
        assert theirs["losses"] == pytest.approx(
            ours["losses"], rel=1e-5 if number < 22 else 1e-4
        )  # 20 steps, 2 epochs
        assert theirs.get("samples") == ours.get("samples")
        assert theirs["epoch"] == ours["epoch"]
    ours, theirs = weights(others / "one"), weights(others / other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.allclose(theirs[name], ours[name], rtol=1e-3, atol=1e-4), name
    assert len(checkpoint.read(others / other / "checkpoint.pt")["rng"]) == 2


def test_a_checkpoint_of_two_ranks_goes_on_with_one(world, pair, tmp_path):
    kept = checkpoint.read(pair / "two" / "checkpoint.pt")
    assert len(kept["rng"]) == 2
    assert not torch.equal(kept["rng"][0]["cpu"], kept["rng"][1]["cpu"])
    kept |= {"epoch": 2, "step": 0, "sums": {}, "log_bytes": 0}
    (tmp_path / "run").mkdir()
    del kept["format"]
    checkpoint.write(tmp_path / "run" / "checkpoint.pt", kept)
    run(world, tmp_path / "run", "aal", u8(world), *SETTINGS, resume=True)
    assert [r["epoch"] for r in log(tmp_path / "run")] == [2, 2]
    assert len(checkpoint.read(tmp_path / "run" / "checkpoint.pt")["rng"]) == 1


@pytest.mark.parametrize("ranks", [1, 2, 3, 9])
def test_every_sample_counts_once_on_any_number_of_ranks(pair, ranks):
    urls = [str(path) for path in sorted((pair / "odd").glob("*.tar"))]
    shards = open_shards(urls)
    model, view, half = _model(), policy("eval", 32), (0.5,) * 3

    def counts(shards: Sequence[Shard], rank: int = 0, world_size: int = 1) -> torch.Tensor:
        batches = evaluation_batches(shards, view, 96, rank=rank, world_size=world_size)
        return count(model, batches, shards, half, half)

    whole = counts(shards)
    parts = [counts(shards, rank, ranks) for rank in range(ranks)]
    assert int(whole[2]) == 393
    assert torch.equal(torch.stack(parts).sum(0)[:3], whole[:3])
    alone = evaluate(model, urls, view, half, half)
    assert alone.samples == 393
    if ranks == 2:  # and really so
        assert {(pair / f"score-{r}").read_text() for r in range(2)} == {repr(alone)}
    more = [counts(shards[:1], rank, ranks) for rank in range(ranks)]
    assert int(torch.stack(more).sum(0)[2]) == 131


@pytest.mark.slow
def test_torchrun_trains_with_one_voice(world, tmp_path):
    words = [*command(world, tmp_path / "run", "scratch", "optim.epochs=1"), "--json"]
    process = start(words, [*TORCHRUN, "-m", "pipeline"])
    told, said = process.communicate(timeout=HANGS)
    assert process.returncode == 0, said
    assert told.count('"top1"') == 1
    assert said.count("epoch 0: ") == 1
    assert "on each of 2 ranks" in said


@pytest.mark.parametrize(
    ("rank", "said", "slow"),
    [
        pytest.param("1", "the loss is not finite on rank 1", 0, marks=pytest.mark.slow),
        ("01", "the loss is not finite", 0),
        pytest.param("01", "the loss is not finite", 12, marks=pytest.mark.slow),
    ],
)
def test_an_error_on_some_rank_ends_all_with_one_message(world, tmp_path, rank, said, slow):
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(root=str(ROOT), rank=rank, slow=slow))
    words = command(world, tmp_path / "run", "scratch", "optim.epochs=50")
    process = start(words, [*TORCHRUN, str(script)])
    _, text = process.communicate(timeout=HANGS)
    assert process.returncode != 0
    assert text.count("error: ") == 1, text
    assert f"error: {said}" in text


@pytest.mark.slow
def test_a_slip_is_told_once(world, tmp_path):
    process = start(command(world, tmp_path / "run", "scratch", "optim.epohcs=1"), [*TORCHRUN, "-m", "pipeline"])
    _, text = process.communicate(timeout=HANGS)
    assert process.returncode != 0
    assert text.count("error: ") == 1, text
    assert "Did you mean 'epochs'?" in text
    assert not (tmp_path / "run").exists()


# The rank that speaks takes so many seconds to come to it.
FAILING = """
import os, sys, time
sys.path.insert(0, {root!r})
class Slow:
    def __init__(self, real):
        self.real = real
    def write(self, text):
        if text.startswith("error: "):
            time.sleep({slow})
        return self.real.write(text)
    def __getattr__(self, name):
        return getattr(self.real, name)
sys.stderr = Slow(sys.stderr)
from pipeline.cli import main
from storage.errors import UserError
from student.training import train
original = train.Update.__call__
def failing(self, batch, epoch, step):
    if os.environ["RANK"] in {rank!r} and step == 3:
        raise UserError("the loss is not finite on rank " + os.environ["RANK"])
    return original(self, batch, epoch, step)
train.Update.__call__ = failing
main(sys.argv[1:])
"""
