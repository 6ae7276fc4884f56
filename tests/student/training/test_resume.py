"""Checkpoints and --resume: killed anywhere, a run goes on to the same weights; nothing else goes on by mistake."""

from __future__ import annotations

import os
import pickle
import signal
import sys
from pathlib import Path

import pytest
import torch

from storage.errors import IdentityError, UserError
from student import run_dir
from student.training import checkpoint
from student.training import train as trainer
from student.training.step import Update
from tests.conftest import HANGS, Quiet
from tests.student.runs import FULL, children, command, job, log, run, same, start, u8, wait_for


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    return out, run(world, out, "aal", u8(world), *FULL)


class Cut(Exception):
    """Stands for a kill where no process is needed."""


def cut_after(monkeypatch, steps: int) -> None:
    """The trainer ends after so many updates in this process."""
    done = [0]
    original = Update.__call__

    def counted(self, *arguments):
        if done[0] == steps:
            raise Cut
        done[0] += 1
        return original(self, *arguments)

    monkeypatch.setattr(Update, "__call__", counted)


@pytest.mark.parametrize(("steps", "interval"), [(4, 3), (9, None), (14, 1)])
def test_a_run_that_was_cut_off_goes_on_to_the_same_weights(world, undisturbed, tmp_path, monkeypatch, steps, interval):
    settings = [u8(world), *FULL, f"checkpoint_interval={interval or 'null'}"]
    with monkeypatch.context() as patched:
        cut_after(patched, steps)
        with pytest.raises(Cut):
            run(world, tmp_path / "run", "aal", *settings)
    torch.manual_seed(1234)  # whatever was drawn meanwhile
    console = Quiet()
    result = trainer.train(job(world, tmp_path / "run", "aal", *settings, resume=True), console)
    assert same(undisturbed[0], tmp_path / "run")
    assert {**result, "run": 0, "seconds": 0} == {**undisturbed[1], "run": 0, "seconds": 0}
    place = {4: "epoch 0 after 3", 9: "epoch 1 after 0", 14: "epoch 1 after 5"}[steps]
    assert any(f"goes on in {place} of 9 steps" in line for line in console.lines)


def test_cut_off_before_its_first_checkpoint_a_run_begins_again(world, undisturbed, tmp_path, monkeypatch):
    settings, out = [u8(world), *FULL], tmp_path / "run"
    with monkeypatch.context() as patched:
        cut_after(patched, 4)
        with pytest.raises(Cut):
            run(world, out, "aal", *settings)
    with pytest.raises(UserError, match="this folder already has a run\n  To resume it, add `resume=True`"):
        run(world, out, "aal", *settings)
    console = Quiet()
    trainer.train(job(world, out, "aal", *settings, resume=True), console)
    assert f"{out}: the run was cut off before its first checkpoint; it begins again" in console.lines
    assert same(undisturbed[0], out)
    (out / "checkpoint.pt").unlink()
    with pytest.raises(UserError, match="no checkpoint here to resume from"):  # a complete run is never begun again
        run(world, out, "aal", *settings, resume=True)


def test_no_line_of_the_log_comes_twice(world, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "LOG_EVERY", 1)
    settings = [u8(world), "checkpoint_interval=3", "tensorboard=true"]
    with monkeypatch.context() as patched:
        cut_after(patched, 5)
        with pytest.raises(Cut):
            run(world, tmp_path / "run", "aal", *settings)
    assert [r["step"] for r in log(tmp_path / "run")] == [0, 1, 2, 3, 4]
    run(world, tmp_path / "run", "aal", *settings, resume=True)
    assert [(r["epoch"], r.get("step")) for r in log(tmp_path / "run")] == [
        (epoch, step) for epoch in (0, 1) for step in [*range(9), None]
    ]


def test_epochs_before_a_resume_stay_in_tensorboard(world, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = [u8(world), "tensorboard=true"]
    with monkeypatch.context() as patched:
        cut_after(patched, 9)
        with pytest.raises(Cut):
            run(world, tmp_path / "run", "aal", *settings)
    run(world, tmp_path / "run", "aal", *settings, resume=True)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("epochs/top1")] == [8, 17]


@pytest.mark.slow
def test_a_command_that_is_killed_goes_on_with_loader_workers(world, undisturbed, tmp_path):
    settings = [u8(world), *FULL, "stream.workers=1", "checkpoint_interval=2"]
    out = tmp_path / "run"
    process = start(command(world, out, "aal", *settings))
    wait_for((out / "checkpoint.pt").exists, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "result.json").exists()
    again = start([*command(world, out, "aal", *settings), "--resume"])
    _, said = again.communicate(timeout=HANGS)
    assert again.returncode == 0, said
    assert "goes on in epoch" in said
    assert same(undisturbed[0], out)


@pytest.mark.slow
def test_a_command_whose_loader_worker_is_killed_says_so_and_goes_on(world, undisturbed, tmp_path):
    settings = [u8(world), *FULL, "stream.workers=2", "checkpoint_interval=1"]
    out = tmp_path / "run"
    process = start(command(world, out, "aal", *settings))
    wait_for((out / "checkpoint.pt").exists, process)
    _, second = sorted(children(process))
    os.kill(second, signal.SIGKILL)
    _, said = process.communicate(timeout=HANGS)
    assert process.returncode == 1, said
    assert f"error: loader worker 2 of 2 (process {second}) was killed by SIGKILL: the usual cause is" in said
    assert "run the same command again with --set stream.workers=1 --resume" in said
    assert "Traceback" not in said
    assert "internal error" not in said
    assert not (out / "result.json").exists()
    again = start([*command(world, out, "aal", *settings), "--set", "stream.workers=1", "--resume"])
    _, said = again.communicate(timeout=HANGS)
    assert again.returncode == 0, said
    assert "goes on in epoch" in said
    assert same(undisturbed[0], out)


KILLED = """
import os, signal, sys
from student.training import checkpoint
from pipeline.cli import main
import {module} as place
calls, original = [0], place.{name}
def faulty(*arguments, **named):
    calls[0] += 1
    if calls[0] == {number}:
        {before}
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **named)
place.{name} = faulty
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name", "number", "before"),
    [
        ("torch", "save", 3, "arguments[1].write(b'PK half of a file'); arguments[1].flush()"),
        ("student.run_dir", "Log.sync", 4, "pass"),
    ],
)
def test_a_kill_while_a_checkpoint_is_written_leaves_the_last_one(
    world, undisturbed, tmp_path, module, name, number, before
):
    settings = [u8(world), *FULL, "checkpoint_interval=2"]
    code = KILLED.format(module=module, name=name, number=number, before=before)
    out = tmp_path / "run"
    process = start(command(world, out, "aal", *settings), [sys.executable, "-c", code])
    process.communicate(timeout=HANGS)
    assert process.returncode == -signal.SIGKILL
    kept = checkpoint.read(out / "checkpoint.pt")
    assert (kept["epoch"], kept["step"]) == (0, 2 * (number - 1))
    run(world, out, "aal", *settings, resume=True)
    assert same(undisturbed[0], out)
    assert not (out / ".checkpoint.pt.part").exists()


@pytest.mark.slow
def test_a_kill_while_the_first_epochs_weights_are_written_leaves_a_run_that_begins_again(world, undisturbed, tmp_path):
    settings, out = [u8(world), *FULL], tmp_path / "run"
    before = "open(arguments[1], 'wb').write(b'half')"
    code = KILLED.format(module="student.models.files", name="save_file", number=1, before=before)
    process = start(command(world, out, "aal", *settings), [sys.executable, "-c", code])
    process.communicate(timeout=HANGS)
    assert process.returncode == -signal.SIGKILL
    assert (out / ".last.safetensors.part").exists()
    with pytest.raises(UserError, match="this folder already has a run\n  To resume it, add `resume=True`"):
        run(world, out, "aal", *settings)
    run(world, out, "aal", *settings, resume=True)
    assert same(undisturbed[0], out)
    assert not list(out.glob(".*"))


@pytest.mark.parametrize(
    "name",
    [
        "last.safetensors",
        "ema.safetensors",
        "best.safetensors",
        "losses.safetensors",
        "run.json",
        "result.json",
        "checkpoint.pt",
        "README.md",
    ],
)
def test_what_a_kill_leaves_of_any_file_counts_as_nothing(tmp_path, name):
    for mark in ("args.yaml", "SMOKE"):
        out = tmp_path / mark
        out.mkdir()
        (out / mark).write_text("")
        (out / f".{name}.part").write_bytes(b"half")
        if mark == "SMOKE":
            run_dir.require_free(out)
        assert run_dir.never_kept(out) == (mark == "args.yaml")
        run_dir.begin(out, smoke=False)
        assert not list(out.iterdir())


@pytest.mark.parametrize("mark", ["args.yaml", "SMOKE"])
@pytest.mark.parametrize("removed", [1, 2, 3])
def test_a_folder_that_was_being_emptied_is_still_a_runs(tmp_path, monkeypatch, mark, removed):
    """Killed while it removes what an earlier run left, a command can be given again."""
    for name in {mark, "args.yaml", "run.json", "log.jsonl", ".last.safetensors.part"}:
        (tmp_path / name).write_text("")
    left, original = [removed], Path.unlink

    def cut(path, missing_ok=False):
        if path.exists():
            if not left[0]:
                raise Cut
            left[0] -= 1
        original(path, missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", cut)
        with pytest.raises(Cut):
            run_dir.begin(tmp_path, smoke=False)
    assert run_dir.is_smoke(tmp_path) == (mark == "SMOKE")
    assert run_dir.is_smoke(tmp_path) or run_dir.never_kept(tmp_path)


@pytest.mark.slow
def test_a_terminated_command_says_how_to_go_on(world, tmp_path):
    out = tmp_path / "run"
    process = start(command(world, out, "scratch", "optim.epochs=500", "checkpoint_interval=1"))
    wait_for((out / "checkpoint.pt").exists, process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=HANGS)
    assert process.returncode == 143
    assert said.count("error: interrupted") == 1
    assert "train: --resume" in said
    checkpoint.read(out / "checkpoint.pt")


@pytest.mark.parametrize(
    ("change", "field", "expected", "found"),
    [
        ("optim.epochs=5", "optim.epochs", 2, 5),
        ("optim.lr=0.001", "optim.lr", 0.002, 0.001),
        ("losses.aal.weight=5", "losses.aal.weight.start", 2000.0, 5.0),
        ("losses.aal=null", "losses.aal.weight.start", 2000.0, None),
        ("model_ema_decay=null", "model_ema_decay", 0.9, None),
    ],
)
def test_another_recipe_is_refused(world, undisturbed, change, field, expected, found):
    with pytest.raises(IdentityError) as refused:
        run(world, undisturbed[0], "aal", u8(world), *FULL, change, resume=True)
    assert (refused.value.field, refused.value.expected, refused.value.found) == (field, expected, found)


def test_other_shards_or_views_are_refused_and_loaders_may_change(world, undisturbed):
    out, result = undisturbed
    with pytest.raises(IdentityError, match=r"checkpoint\.pt: shards: the run has .*-000001.*, asked for .*-000000"):
        run(world, out, "aal", u8(world), *FULL, shards=world.shards[:1], resume=True)
    with pytest.raises(IdentityError, match="validation shards: the run has"):
        run(world, out, "aal", u8(world), *FULL, val=world.shards[:1], resume=True)
    console = Quiet()
    free = ["stream.workers=1", "stream.memory=2", "checkpoint_interval=7", "val_interval=2"]
    again = trainer.train(job(world, out, "aal", u8(world), *FULL, *free, resume=True), console)
    assert again == result
    assert "this run is complete" in console.lines[-1]


def test_a_folder_without_a_checkpoint_says_so(world, tmp_path):
    with pytest.raises(UserError, match="no checkpoint here to resume from\n  Without `resume=True` a new run begins"):
        run(world, tmp_path / "none", "scratch", resume=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"")
    with pytest.raises(UserError, match="this folder already has a run\n  To resume it, add `resume=True`"):
        run(world, tmp_path / "run", "scratch")


class Hostile:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_damaged_and_hostile_checkpoints_are_refused(undisturbed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole, path = (undisturbed[0] / "checkpoint.pt").read_bytes(), tmp_path / "checkpoint.pt"
    place = whole.index(checkpoint.read(undisturbed[0] / "checkpoint.pt")["student"]["norm.weight"].numpy().tobytes())
    flipped = bytearray(whole)
    flipped[place + 5] ^= 1  # in a weight: torch alone would take it
    for data in (whole[: len(whole) // 2], b"", b"nonsense", bytes(flipped)):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"checkpoint\.pt: damaged.*\n.*Begin again in a new folder"):
            checkpoint.read(path)
    path.write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(UserError, match="damaged, or not a checkpoint"):
        checkpoint.read(path)
    torch.save({"format": 1, "student": Hostile()}, path)
    with pytest.raises(
        UserError, match=r"not a checkpoint: it is a pickle with more than plain data in it: \w+\.system"
    ):
        checkpoint.read(path)
    assert not Path("ran").exists()
    torch.save({"format": 1, "student": {}}, path)
    with pytest.raises(UserError, match=r"not a checkpoint that `train\(\)` wrote: recipe, .* is missing"):
        checkpoint.read(path)


def test_a_smoke_run_is_marked_and_makes_way(world, undisturbed, tmp_path):
    out, console = tmp_path / "run", Quiet()
    result = trainer.train(job(world, out, "aal", u8(world), *FULL, "optim.epochs=300", smoke=True), console)
    assert (result["smoke"], result["steps"], result["samples"]) == (True, 3, 128)
    assert checkpoint.read(out / "checkpoint.pt")["epoch"] == 1
    assert any("smoke run" in line for line in console.lines)
    with pytest.raises(UserError, match="a smoke run lies here, which cannot be resumed"):
        run(world, out, "aal", u8(world), *FULL, resume=True)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"this folder also has notes\.txt; give a new folder"):
        run(world, out, "aal", u8(world), *FULL)
    (out / "notes.txt").unlink()
    assert run(world, out, "aal", u8(world), *FULL)["smoke"] is False
    assert same(undisturbed[0], out)
    with pytest.raises(UserError, match="this folder already has a run"):
        run(world, out, "aal", u8(world), smoke=True)
