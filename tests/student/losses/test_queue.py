"""SEED and CompRess: known answers, their queues, and that pieces, ranks and a kill change nothing in them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch
from torch.autograd import gradcheck

from storage.errors import UserError
from student.alignment.student_spec import StudentSpec
from student.losses import compress, seed
from student.losses.parts.queue import Queue, unit
from student.losses.registry import LOSSES
from student.training import checkpoint
from student.training import train as trainer
from tests.conftest import Quiet, World
from tests.manifests import stored
from tests.student.runs import job, log, run, same, weights
from tests.student.training.test_ranks import together
from tests.student.training.test_resume import Cut, cut_after
from tests.typed import grad, present

if TYPE_CHECKING:
    from pathlib import Path

F64 = torch.float64


def units(*shape: int, seed: int = 0) -> torch.Tensor:
    return unit(torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed)))


# ---------------------------------------------------------------------------------------------- known answers


def test_seed_is_cross_entropy_over_the_own_entry_and_the_queue():
    mine, theirs, queue = units(4, 6), units(4, 6, seed=1), units(9, 6, seed=2)
    by_hand = []
    for s, t in zip(mine, theirs, strict=True):
        entries = torch.cat([t[None], queue])
        by_hand.append(-((entries @ t / 0.5).softmax(0) * (entries @ s / 0.2).log_softmax(0)).sum())
    assert torch.isclose(seed.cross_entropy(mine, theirs, queue, 0.2, 0.5), torch.stack(by_hand).mean())
    assert seed.cross_entropy(mine, theirs, queue[:0], 0.2, 0.5) == 0, "one entry alone says nothing"


def test_seed_s_minimum_is_the_teacher_s_entropy():
    theirs, queue = units(4, 6).requires_grad_(), units(9, 6, seed=2)
    own = torch.cat([torch.ones(4, 1, dtype=F64), theirs.detach() @ queue.T], 1) / 0.3
    found = seed.cross_entropy(theirs, theirs.detach(), queue, 0.3, 0.3)
    assert torch.isclose(found, -(own.softmax(1) * own.log_softmax(1)).sum(1).mean())
    found.backward()
    assert grad(theirs).abs().max() < 1e-12
    assert seed.cross_entropy(units(4, 6, seed=7), theirs, queue, 0.3, 0.3) > found


def test_compress_is_zero_for_a_student_that_is_its_teacher_with_one_queue_and_two():
    mine, theirs = units(4, 6), units(4, 6, seed=1)
    queue, other = units(9, 6, seed=2), units(9, 6, seed=3)
    assert compress.divergence(theirs, theirs, (queue, queue), 0.04).abs() < 1e-12
    p, q = (theirs @ queue.T / 0.04).softmax(1), (mine @ queue.T / 0.04).softmax(1)
    assert torch.isclose(compress.divergence(mine, theirs, (queue, queue), 0.04), (p * (p / q).log()).sum(1).mean())
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=F64, generator=torch.Generator().manual_seed(4))).Q
    assert compress.divergence(theirs @ turn, theirs, (queue @ turn, queue), 0.04) < 1e-12, "each in a space of its own"
    assert compress.divergence(theirs, theirs, (other, queue), 0.04) > 1
    empty = mine.requires_grad_()
    nothing = compress.divergence(empty, theirs, (queue[:0], queue[:0]), 0.04)
    nothing.backward()
    assert nothing == 0
    assert (grad(empty) == 0).all()


def test_input_gradients():
    theirs, queue = units(3, 5, seed=1), units(4, 5, seed=2)
    mine = torch.randn(3, 5, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert gradcheck(lambda x: seed.cross_entropy(unit(x), theirs, queue, 0.5, 0.5), mine)
    assert gradcheck(lambda x: compress.divergence(unit(x), theirs, (queue, queue), 0.5), mine)


# ---------------------------------------------------------------------------------------------- the queue


@pytest.mark.parametrize(("size", "batch"), [(20, 8), (10, 4), (8, 8), (13, 5), (9, 1)])
def test_a_queue_is_a_ring_that_holds_the_last_images(size, batch):
    queue = Queue(size, 2)
    slots: dict[int, torch.Tensor] = {}
    assert queue.held.shape == (0, 2)
    for step in range(12):
        rows = torch.arange(step * batch, (step + 1) * batch)[:, None] + torch.tensor([0.0, 0.5])
        queue.push([rows[: batch // 2], rows[batch // 2 :]])
        slots |= {int(n) % size: row for n, row in zip(rows[:, 0], rows, strict=True)}
        assert torch.equal(queue.held, torch.stack([slots[place] for place in range(len(slots))]))
    assert sorted(queue.held[:, 0].tolist()) == list(range(12 * batch - size, 12 * batch))


@pytest.mark.parametrize(
    ("queues", "width", "known"),
    [(1, 6, (16.493292, 15.843461, 20.314314)), (2, 9, (7.77774, 20.845156, 13.561279))],
)
def test_compress_gives_the_losses_of_the_authors_code_where_the_batch_does_not_divide_the_queue(queues, width, known):
    """Theirs in steps 4 to 6, when none of the random entries that their queue begins with is left."""
    settings = compress.CompRessConfig(depth=0, queue=20, queues=queues, temperature=0.04)
    shape = StudentSpec(2, 3, 4, ("class",), width=6)
    method = compress.CompRessLoss("it", settings, shape, [stored("class_token", [width])]).double()
    found = []
    for step in range(6):
        mine, theirs = (
            torch.sin(torch.arange(8 * w, dtype=F64).view(8, w).square() * phase + step)
            for w, phase in ((6, 0.37), (width, 0.61))
        )
        found.append(method(SimpleNamespace(student_taps=SimpleNamespace(embedding=mine), targets=(theirs,))).item())
        for queue in (method.theirs, method.mine):
            if queue is not None:
                queue.push([queue.offered])
    assert found[0] == 0
    assert found[3:] == pytest.approx(known, abs=1e-5)


def _fill(number: int, ranks: int, out: Path) -> None:
    queue = Queue(40, 1)
    for step in range(3):
        rows = torch.arange(32.0).view(8, 4)[number::ranks].reshape(-1, 1) + 32 * step  # its lanes, of eight
        queue.push(rows.split(8), lanes=8)
    torch.save(queue.held, out / f"{number}.pt")


def test_ranks_fill_a_queue_in_the_order_of_the_batch(tmp_path):
    """Which images of a batch leave first does not depend on the ranks."""
    together(2, _fill, tmp_path)
    expected = torch.cat([torch.arange(80.0, 96), torch.arange(56.0, 80)])
    for number in range(2):
        assert torch.equal(torch.load(tmp_path / f"{number}.pt")[:, 0], expected)


def test_a_queue_comes_back_from_a_checkpoint():
    queue, other = Queue(10, 2), Queue(10, 2)
    for n in range(3):
        queue.push([torch.full((4, 2), float(n))])
    other.load_state_dict(queue.state_dict())
    assert torch.equal(other.held, queue.held)
    for one in (queue, other):
        one.push([torch.full((4, 2), 9.0)])
    assert torch.equal(other.held, queue.held)


# ---------------------------------------------------------------------------------------------- in a run

RECIPE = """
losses:
  seed: {queue: 100}
  one: {type: compress, queue: 64}
  two: {type: compress, queues: 2, queue: 100, weight: 0.5}
  alignment: {distance: cosine}
"""
SETTINGS = ["optim.opt=momentum", "optim.lr=0.01", "optim.clip_grad=1"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("recipe") / "queues.yaml"
    path.write_text(RECIPE)
    return str(path)


@pytest.fixture(scope="module")
def whole(world: World, recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of nine steps with all of them; every step is logged."""
    out = tmp_path_factory.mktemp("queues") / "whole"
    every, trainer.LOG_EVERY = trainer.LOG_EVERY, 1
    try:
        run(world, out, recipe, *SETTINGS)
    finally:
        trainer.LOG_EVERY = every
    return out


def queues(out: Path) -> dict[str, torch.Tensor]:
    """The entries of a run's queues."""
    kept = checkpoint.read(out / "checkpoint.pt")["losses"]
    return {name.removesuffix("._extra_state"): state["entries"] for name, state in kept.items() if "extra" in name}


def test_queues_fill_and_are_kept_with_the_run_and_not_beside_the_student(whole):
    kept = queues(whole)
    assert set(kept) == {"seed.queue", "one.theirs", "two.mine", "two.theirs"}
    for name, entries in kept.items():
        assert len(entries) == (64 if name.startswith("one") else 100)
        assert torch.allclose(entries.norm(dim=1), torch.ones(()))
    assert torch.equal(kept["seed.queue"], kept["two.theirs"])
    left = {name for name in weights(whole) if name.startswith("losses ")}
    assert any("alignment.token.projector" in name for name in left)
    assert not any("entries" in name or "extra_state" in name for name in left)


def _train(number: int, ranks: int, one: trainer.TrainConfig) -> None:
    trainer.LOG_EVERY = 1
    trainer.train(one, Quiet())


@pytest.mark.slow
def test_pieces_and_two_ranks_give_the_losses_and_queues_of_one(world, recipe, whole, tmp_path, monkeypatch):
    together(2, _train, job(world, tmp_path / "two", recipe, *SETTINGS))
    monkeypatch.setattr(trainer, "LOG_EVERY", 1)
    run(world, tmp_path / "pieces", recipe, *SETTINGS, "optim.grad_accum_steps=2")
    ours = log(whole)
    assert len(ours) == 20
    for other in ("two", "pieces"):
        for mine, theirs in zip(ours, log(tmp_path / other), strict=True):
            assert theirs["losses"] == pytest.approx(mine["losses"], rel=1e-4, abs=1e-6), other
        for name, entries in queues(tmp_path / other).items():
            assert torch.allclose(entries, queues(whole)[name], atol=1e-3), (other, name)


def test_cut_off_a_run_goes_on_with_its_queues(world, recipe, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "LOG_EVERY", 1)
    with monkeypatch.context() as patched:
        cut_after(patched, 5)
        with pytest.raises(Cut):
            run(world, tmp_path / "run", recipe, *SETTINGS, "checkpoint_interval=3")
    run(world, tmp_path / "run", recipe, *SETTINGS, resume=True)
    assert same(whole, tmp_path / "run")
    assert all(torch.equal(entries, queues(whole)[name]) for name, entries in queues(tmp_path / "run").items())


def test_a_batch_goes_into_a_queue(world, recipe, tmp_path):
    with pytest.raises(
        UserError, match=r"one: a batch of 32 does not fit into a queue of 20\n.*`losses\.one\.queue=32`"
    ):
        run(world, tmp_path / "run", recipe, "losses.one.queue=20")


def test_the_teacher_may_have_pooled_features_alone():
    """CompRess and SimReg were made for CNNs."""
    shape = StudentSpec(2, 3, 4, ("class",), width=6)
    for name in ("seed", "compress", "alignment"):
        read = LOSSES[name].requirement("it", LOSSES[name].Config(), shape)
        assert present(read).words == "class_token, or embedding"
