"""Precision, attention kernel and compilation: measured without a trace, used as chosen, refused where impossible."""

from __future__ import annotations

import json

import pytest
import torch

from storage.errors import UserError
from student import config, speed
from student import train as trainer
from student.lesson import Lesson
from student.prepare import prepare
from tests.conftest import Quiet
from tests.student.runs import job, log, run, same, u8

AUTO = ["speed.amp=auto", "speed.attention=auto"]


@pytest.fixture
def times(monkeypatch):
    """Steps that take what a test says: (precision, kernel) -> seconds."""
    told: dict[tuple[str, str], float] = {}

    def step(lesson, batch, amp, attention):
        original(lesson, batch, amp, attention)
        return told[amp, attention]

    original = speed._step
    monkeypatch.setattr(speed, "COST", 0)  # these runs are short
    monkeypatch.setattr(speed, "_step", step)
    return told


def parts(world, tmp_path, *settings):
    return prepare(job(world, tmp_path / "run", "aal", u8(world), *settings), Quiet(), None)


@pytest.mark.parametrize(
    ("measured", "wanted"),
    [
        ((1.0, 0.9, 0.9, 0.4), ("bfloat16", "unfused")),
        ((1.0, 0.9, 0.8, 0.76), ("none", "unfused")),  # less than 1.2 times faster than the best f32
        ((1.0, 0.99, 2.0, 2.0), ("none", "fused")),
        ((1.0, 2.0, 0.5, 0.49), ("bfloat16", "fused")),
    ],
)
def test_another_precision_has_to_be_worth_it(world, tmp_path, times, measured, wanted):
    ways = [("none", "fused"), ("none", "unfused"), ("bfloat16", "fused"), ("bfloat16", "unfused")]
    times |= dict(zip(ways, measured, strict=True))
    made = parts(world, tmp_path)
    batch = next(made.stream.epoch(0))
    choice = speed.choose(made.lesson, batch, config.Speed(), 1)
    assert (choice.amp, choice.attention) == wanted
    text = speed.line(choice, 32)
    assert f"{wanted[1]} attention" in text
    assert "f32 fused 1e+03 ms" in text
    forced = speed.choose(made.lesson, batch, config.Speed(amp="bfloat16"), 1)
    assert forced.amp == "bfloat16"
    assert len(forced.measured) == 2


def test_measuring_leaves_no_trace(world, tmp_path, times):
    times |= dict.fromkeys([(a, k) for a in ("none", "bfloat16") for k in ("fused", "unfused")], 1.0)
    settings = [u8(world), "student.drop_path_rate=0.2", "student.drop_rate=0.1"]
    run(world, tmp_path / "told", "aal", *settings)
    result = run(world, tmp_path / "measured", "aal", *settings, *AUTO)
    assert len(result["speed"]["measured"]) == 4
    assert same(tmp_path / "told", tmp_path / "measured")
    told = json.loads((tmp_path / "measured" / "run.json").read_text())
    assert told["speed"] == result["speed"]


def test_a_resumed_run_keeps_what_was_measured(world, tmp_path, times, monkeypatch):
    times |= {
        ("none", "fused"): 1.0,
        ("none", "unfused"): 1.0,
        ("bfloat16", "fused"): 0.5,
        ("bfloat16", "unfused"): 0.1,
    }
    settings = [u8(world), *AUTO, "checkpoint_interval=1"]
    monkeypatch.setattr(trainer.folder, "write_json", lambda path, content: None)  # as if killed at the very end
    whole = run(world, tmp_path / "run", "aal", *settings)
    monkeypatch.setattr(speed, "choose", None)
    again = run(world, tmp_path / "run", "aal", *settings, resume=True)
    assert again["speed"] == whole["speed"]
    assert (again["speed"]["amp"], again["speed"]["attention"]) == ("bfloat16", "unfused")


def test_unfused_bfloat16_gives_about_the_same_losses_and_they_are_f32(world, tmp_path):
    made = parts(world, tmp_path)
    batch = next(made.stream.epoch(0))
    logits, exact = made.lesson(batch)
    speed.apply(made.lesson, "bfloat16", "unfused")
    assert [m.fused_attn for m in speed.attention_modules(made.lesson.student)] == [False, False]
    rounded, values = made.lesson(batch)
    assert {value.dtype for value in values.values()} == {torch.float32}
    assert not torch.equal(rounded, logits)
    for name in exact:
        assert torch.allclose(values[name], exact[name], rtol=2e-2)
    speed.apply(made.lesson, "none", "unfused")
    assert torch.allclose(made.lesson(batch)[0], logits, atol=1e-5)


def test_float16_needs_cuda_and_compilation_a_compiler(world, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"speed\.amp=float16 needs CUDA .* use bfloat16, none or auto"):
        run(world, tmp_path / "run", "scratch", "speed.amp=float16")
    monkeypatch.setattr(speed.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"torch\.compile needs a C\+\+ compiler and finds none"):
        run(world, tmp_path / "run", "scratch", "speed.compile=true")


def compiled(world, tmp_path, monkeypatch, backend: str) -> None:
    """Losses, taps and gradients of a compiled student are those of a plain one."""
    made = parts(world, tmp_path)
    batch = next(made.stream.epoch(0))

    def gradients(lesson: Lesson) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        lesson.zero_grad()
        _, values = lesson(batch)
        lesson.total(values, 0).backward()
        return {n: v.item() for n, v in values.items()}, {n: p.grad.clone() for n, p in lesson.named_parameters()}

    plain, slopes = gradients(made.lesson)
    monkeypatch.setattr(speed, "BACKEND", backend)
    names = list(made.lesson.student.state_dict())
    speed.compile_student(made.lesson)
    assert list(made.lesson.student.state_dict()) == names
    for _ in range(2):
        ours, theirs = gradients(made.lesson)
        assert ours == pytest.approx(plain, rel=1e-4)
        for name, slope in slopes.items():
            assert torch.allclose(theirs[name], slope, rtol=1e-3, atol=1e-5), name


def test_a_compiled_student_has_the_same_losses(world, tmp_path, monkeypatch):
    compiled(world, tmp_path, monkeypatch, "aot_eager")


@pytest.mark.long
def test_a_student_compiled_to_machine_code_has_the_same_losses(world, tmp_path, monkeypatch):
    compiled(world, tmp_path, monkeypatch, "inductor")


@pytest.mark.long
def test_a_compiled_run_has_the_same_losses(world, tmp_path):
    settings = [u8(world), "optim.opt=momentum", "optim.lr=0.01", "ema=0.9", "optim.accumulate=2"]
    plain = run(world, tmp_path / "plain", "aal", *settings)
    quick = run(world, tmp_path / "quick", "aal", *settings, "speed.compile=true")
    assert quick["samples"] == plain["samples"]
    for ours, theirs in zip(log(tmp_path / "plain"), log(tmp_path / "quick"), strict=True):
        assert theirs["losses"] == pytest.approx(ours["losses"], rel=1e-4)
