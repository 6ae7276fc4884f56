"""Nothing is read back within a step: how often it is, what that finds, and that it changes no number."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from storage.errors import UserError
from student.data.batch import Batch
from student.training import prefetch
from student.training import train as trainer
from student.training.distiller import Distiller
from student.training.optimizer import build_optimizer, load_optimizer
from student.training.setup import build_run
from student.training.step import Update
from student.training.step_record import StepRecord, StepScalars
from tests.conftest import Quiet
from tests.student.runs import FULL, job, log, run, same, u8
from tests.student.training.test_ranks import together

if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")


class Lists(TorchFunctionMode):
    """Counts what dispatching does not see on a CPU: tensors as lists, arrays and copies on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(func, "__name__", "") in ("tolist", "numpy", "cpu", "__array__")
        return func(*args, **(kwargs or {}))


class HostReads(TorchDispatchMode):
    """Counts reads of tensors that are on the device where there is one, as numbers.

    Not counted: AdamW's `step`, which PyTorch keeps on the host, and integers, of which `one_hot` reads the range, on a
    CPU alone.
    """

    def __init__(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        super().__init__()
        self.optimizer, self.count = optimizer, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        copied = func is torch.ops.aten._to_copy.default and kwargs.get("device") == CPU  # noqa: SLF001
        if copied or func is torch.ops.aten._local_scalar_dense.default:  # noqa: SLF001
            states = self.optimizer.state.values() if self.optimizer else ()
            steps = [state["step"] for state in states if "step" in state]
            own = any(step.data_ptr() == args[0].data_ptr() for step in steps)
            self.count += args[0].is_floating_point() and not own
        return func(*args, **kwargs)


def made(world, tmp_path, *settings):
    asked = job(world, tmp_path / "run", "aal", u8(world), "stream.batch_size=16", *settings)
    parts = build_run(asked, Quiet(), None)
    optimizer, _ = build_optimizer(asked.recipe, parts.distiller, 18)
    update = Update(asked.recipe, parts.distiller, optimizer, average=parts.average, device=CPU, scaled=False)
    return parts, optimizer, update


@pytest.mark.parametrize("settings", [FULL, ["optim.grad_accum_steps=2", "losses.deit={same_classes: true}"]])
def test_ten_steps_are_read_back_once(world, tmp_path, settings):
    settings = [*settings, *(["losses.deit.target=" + world.targets["logits"]] if settings is not FULL else [])]
    parts, optimizer, update = made(world, tmp_path, *settings)
    record = StepRecord(10)
    batches = parts.stream.epoch(0)
    record.add(update(next(batches), 0, 0))  # the optimizer makes its state
    for step in range(1, 10):
        assert not record.full
        batch = next(batches)
        with Lists() as lists, HostReads(optimizer) as reads:
            record.add(update(batch, 0, step))
        assert (lists.count, reads.count) == (0, 0)
    assert record.full
    with Lists() as lists, HostReads() as reads:
        numbers = record.fetch()
    assert (len(numbers), lists.count, reads.count) == (10, 1, 0)
    assert not record.fetch()


def test_reads_are_counted():
    values = torch.rand(3)
    with Lists() as lists, HostReads() as reads:
        values.tolist()
        assert float(values[1]) < 1
        values.sum().item()
    assert (lists.count, reads.count) == (1, 2)


def test_a_run_reads_back_every_ten_steps(world, tmp_path, monkeypatch):
    sizes, reads = [], HostReads()
    fetch, epoch = StepRecord.fetch, trainer.Trainer._epoch  # noqa: SLF001

    def fetched(self):
        numbers = fetch(self)
        sizes.append(len(numbers))
        return numbers

    def counted(self, *arguments):
        reads.optimizer = self.optimizer
        with reads:
            epoch(self, *arguments)

    monkeypatch.setattr(StepRecord, "fetch", fetched)
    monkeypatch.setattr(trainer.Trainer, "_epoch", counted)
    run(world, tmp_path / "run", "scratch", "stream.batch_size=8", "optim.epochs=1", store=None)
    assert [size for size in sizes if size] == [1, 10, 10, 10, 6]  # 37 steps, of which the first is logged
    assert reads.count == 0


@pytest.mark.parametrize("settings", [[], ["optim.grad_accum_steps=4"]])
def test_when_numbers_are_fetched_changes_none(world, tmp_path, monkeypatch, settings):
    settings = [u8(world), *FULL, "stream.batch_size=16", *settings]
    for every in (1, 10, 1000):
        monkeypatch.setattr(trainer, "FETCH_EVERY", every)
        run(world, tmp_path / str(every), "aal", *settings)
    assert same(tmp_path / "1", tmp_path / "10")
    assert same(tmp_path / "1", tmp_path / "1000")
    assert len(log(tmp_path / "10")) == 4


def test_means_are_those_of_plain_sums():
    torch.manual_seed(0)
    values = torch.rand(3, 4, 2)  # steps, micro-batches, names
    record = StepRecord(10)
    for step in range(3):
        record.add(StepScalars(epoch=0, step=step, names=("loss", "losses/a"), values=tuple(values[step])))
    for step, numbers in enumerate(record.fetch()):
        for column, name in enumerate(("loss", "losses/a")):
            total = 0.0
            for value in values[step, :, column].tolist():
                total += value / 4
            assert numbers[name] == total


def break_total(monkeypatch, at: int) -> None:
    """The total is not a number in a forward pass, counted from 0."""
    calls, total = [0], Distiller.total

    def broken(self, values, epoch):
        calls[0] += 1
        return total(self, values, epoch) * (float("nan") if calls[0] == at + 1 else 1.0)

    monkeypatch.setattr(Distiller, "total", broken)


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        (["checkpoint_interval=5"], set()),
        (["checkpoint_interval=3"], {"checkpoint.pt"}),  # after the third step, which is number 2
        ([], set()),  # at the end of the epoch
    ],
)
def test_nothing_is_written_after_a_loss_that_is_not_finite(world, tmp_path, monkeypatch, settings, left):
    break_total(monkeypatch, 3)
    out, where = tmp_path / "run", "^epoch 0, step 3: the loss is not finite"
    with pytest.raises(UserError, match=rf"{where} \(crossentropy \d\.\d+, aal \d") as ended:
        run(world, out, "aal", u8(world), *FULL, *settings)
    assert ended.value.hint == "Lower the learning rate, `optim.lr=X`, or cap the gradients, `optim.clip_grad=1`"
    written = {path.name for path in out.iterdir()} - {"args.yaml", "run.json", "log.jsonl"}
    assert written == left
    assert [record["step"] for record in log(out)] == [0]


def test_a_micro_batch_that_is_not_finite_is_found_in_its_step(world, tmp_path, monkeypatch):
    break_total(monkeypatch, 4 * 3 + 2)
    with pytest.raises(UserError, match=r"epoch 0, step 3: the loss is not finite"):
        run(world, tmp_path / "run", "scratch", "optim.grad_accum_steps=4", store=None)


def _find(number: int, ranks: int, cases: list[tuple[int | None, ...]], out: Path) -> None:
    for case, failing in enumerate(cases):
        _find_in(number, failing, out / f"{case} {number}")


def _find_in(number: int, failing: tuple[int | None, ...], out: Path) -> None:
    """Write what this rank says, where one rank, or none, has a bad loss in each of three steps."""
    record = StepRecord(3)
    for step, rank in enumerate(failing):
        loss = torch.tensor([float("nan") if number == rank else 1.0, 2.0 + number])
        record.add(StepScalars(epoch=4, step=step, names=("loss", "losses/a"), values=(loss,)))
    try:
        record.fetch()
    except UserError as error:
        out.write_text(error.message)


def test_all_ranks_name_the_first_step_that_was_not_finite(tmp_path):
    cases: list[tuple[int | None, ...]] = [(None, 1, 0), (None, 1, None), (None, None, None)]
    together(2, _find, cases, tmp_path)
    told = {path.name: path.read_text() for path in tmp_path.iterdir()}
    names = [f"{case} {rank}" for case in range(2) for rank in range(2)]  # and nothing where there is nothing
    assert told == dict.fromkeys(names, "epoch 4, step 1: the loss is not finite (a 3)")


def test_constants_of_pixels_are_those_of_a_batch(world, tmp_path):
    parts, *_ = made(world, tmp_path)
    batch = next(parts.stream.epoch(0))
    mean, std = parts.distiller.mean, parts.distiller.std
    assert torch.equal(parts.distiller._pixels(batch), batch.pixels(mean, std))  # noqa: SLF001


def test_kernels_of_an_optimizer_are_those_of_its_device_not_of_its_state():
    def after(fused, state=None):
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.rand(5))
        optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=fused)
        if state is not None:
            load_optimizer(optimizer, state)
        parameter.grad = torch.rand(5)
        optimizer.step()
        return parameter, optimizer

    _, fused = after(True)
    _, plain = after(None)
    kept, state = fused.state_dict(), copy.deepcopy(plain.state_dict())
    assert kept["param_groups"][0]["fused"] is True
    kept["state"] = copy.deepcopy(state["state"])
    ours, optimizer = after(None, kept)
    theirs, _ = after(None, state)
    assert optimizer.param_groups[0]["fused"] is None
    assert torch.equal(ours, theirs)


class FakeGPU:
    """What happens in which order, where a GPU is asked for."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.steps = 0

    def record_event(self) -> FakeGPU:
        fake = FakeGPU()
        fake.events, fake.steps = self.events, self.steps
        return fake

    def synchronize(self) -> None:
        self.events.append(f"wait for {self.steps}")

    def wait_stream(self, other: object) -> None:
        assert other is not self


@dataclasses.dataclass
class FakeBatch:
    number: int
    gpu: FakeGPU

    def pin_memory(self) -> FakeBatch:
        return self

    def to(self, device: torch.device) -> FakeBatch:
        self.gpu.events.append(f"copy {self.number}")
        return self

    def record_stream(self, stream: object) -> None:
        assert stream is self.gpu


def test_the_next_batch_is_copied_while_a_step_runs(monkeypatch):
    gpu = FakeGPU()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: gpu)
    batches: Any = (FakeBatch(number, gpu) for number in range(5))
    for batch in prefetch.batches_on_device(batches, torch.device("cuda", 0)):
        gpu.steps = batch.number  # type: ignore[attr-defined]
        gpu.events.append(f"step {gpu.steps}")
    copies, steps = ["copy 0", "step 0", "copy 1", "step 1"], []
    for number in (2, 3, 4):  # at most two steps are on their way
        steps += [f"wait for {number - 2}", f"copy {number}", f"step {number}"]
    assert gpu.events == [*copies, *steps]


def some_batch() -> Batch:
    torch.manual_seed(1)
    labels = torch.arange(4)
    return Batch(
        images=torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8),
        labels=labels,
        mix_labels=labels,
        mix_weights=torch.rand(4),
        ids=torch.zeros(4, 3).long(),
        targets={"t": {"data": torch.rand(4, 3)}},
    )


def test_on_a_cpu_a_batch_is_handed_on_as_it_is():
    batch = some_batch()
    (same_one,) = prefetch.batches_on_device([batch], CPU)
    assert same_one.images is batch.images
    assert same_one.targets["t"]["data"] is batch.targets["t"]["data"]


@pytest.mark.gpu
def test_batches_reach_a_gpu_as_they_are(world, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda", 0)
    batches = [dataclasses.replace(some_batch(), mix_weights=torch.full((4,), float(n))) for n in range(20)]
    for batch, copied in zip(batches, prefetch.batches_on_device(batches, device), strict=True):
        assert copied.images.device == device
        assert torch.equal(copied.images.cpu(), batch.images)
        assert torch.equal(copied.mix_weights.cpu(), batch.mix_weights)
        assert torch.equal(copied.targets["t"]["data"].cpu(), batch.targets["t"]["data"])


@pytest.mark.gpu
def test_a_step_on_a_gpu_never_waits_for_it(world, tmp_path):
    """PyTorch itself tells of each operation that makes the host wait."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    asked = job(world, tmp_path / "run", "aal", u8(world), *FULL, device="cuda")
    parts = build_run(asked, Quiet(), None)
    optimizer, _ = build_optimizer(asked.recipe, parts.distiller, 9)
    assert all(group["fused"] for group in optimizer.param_groups)
    device = torch.device("cuda")
    update = Update(asked.recipe, parts.distiller, optimizer, average=parts.average, device=device, scaled=False)
    record = StepRecord(10)
    batches = prefetch.batches_on_device(parts.stream.epoch(0), device)
    record.add(update(next(batches), 0, 0))
    try:
        for step in range(1, 9):
            batch = next(batches)
            torch.cuda.set_sync_debug_mode("error")
            record.add(update(batch, 0, step))
            torch.cuda.set_sync_debug_mode("default")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(record.fetch()) == 9
