"""Precision, attention kernel and compilation: by rule, never by the clock; kept on resume; refused if impossible."""

from __future__ import annotations

import json
import runpy
from typing import TYPE_CHECKING

import pytest
import torch

from storage.errors import UserError
from student.alignment import student_taps
from student.distributed import Processor
from student.recipe import schema
from student.training import precision
from student.training.setup import build_run
from tests.conftest import HANGS, ROOT, Quiet
from tests.student.runs import command, job, log, run, same, start, u8
from tests.typed import grad

if TYPE_CHECKING:
    from student.training.distiller import Distiller

OLD = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}  # as on a processor with AVX2 alone
HAS = {"avx512_bf16": True, "amx_bf16": False, "avx2": True}
PROCESSORS = {  # and whether they multiply bfloat16
    "Zen 4 and later": (Processor(level="AVX512", flags=HAS, onednn=True), True),
    "Sapphire Rapids": (Processor(level="AVX512", flags={"avx512_bf16": True, "amx_bf16": True}, onednn=True), True),
    "AVX-512 without bf16": (
        Processor(level="AVX512", flags={"avx512_f": True, "avx512_bf16": False}, onednn=True),
        False,
    ),
    "AVX2 alone": (Processor(level="AVX2", flags={"avx2": True, "avx512_bf16": False}, onednn=False), False),
    "torch held at AVX2": (Processor(level="AVX2", flags=HAS, onednn=True), False),
    "oneDNN held at AVX2": (Processor(level="AVX512", flags=HAS, onednn=False), False),
    "ARM with bf16": (Processor(level="DEFAULT", flags={"neon": True, "bf16": True}, onednn=True), True),
    "ARM without": (Processor(level="DEFAULT", flags={"neon": True, "bf16": False}, onednn=False), False),
    "ARM without oneDNN": (Processor(level="DEFAULT", flags={"neon": True, "bf16": True}, onednn=False), False),
}
CPU = torch.device("cpu")


def parts(world, tmp_path, *settings):
    return build_run(job(world, tmp_path / "run", "aal", u8(world), *settings), Quiet(), None)


@pytest.mark.parametrize("name", PROCESSORS)
def test_auto_follows_what_the_processor_has(name):
    processor, native = PROCESSORS[name]
    auto = precision.choose(schema.PrecisionConfig(amp_dtype="auto"), CPU, processor)
    assert (auto.amp_dtype, auto.fused_attn) == (("bfloat16", False) if native else ("none", True))
    (told,) = precision.lines(auto, CPU, processor)
    assert told == f"precision: {'bfloat16, unfused' if native else 'f32, fused'} attention"


@pytest.mark.parametrize("name", PROCESSORS)
def test_contract_16_no_machine_chooses_what_a_recipe_says(name):
    processor, native = PROCESSORS[name]
    plain = precision.choose(schema.PrecisionConfig(), CPU, processor)
    assert (plain.amp_dtype, plain.fused_attn) == ("none", True)
    assert ("precision.amp_dtype=auto" in precision.lines(plain, CPU, processor)[0]) == native
    wish = precision.choose(schema.PrecisionConfig(amp_dtype="bfloat16", fused_attn=True), CPU, processor)
    assert (wish.amp_dtype, wish.fused_attn) == ("bfloat16", True)
    warnings = precision.lines(wish, CPU, processor)[1:]
    assert len(warnings) == (not native)
    for warning in warnings:
        assert f"this processor ({processor.level}) has no bf16 instructions" in warning
        assert "10 to 35 times as long as in f32" in warning
        assert "`precision.amp_dtype=none`" in warning


def result_of(out):
    return json.loads((out / "result.json").read_text())


@pytest.mark.slow
def test_on_a_processor_without_bf16_the_study_computes_in_f32(world, tmp_path):
    """Its precision, in a process that is held to AVX2: the weights are those of an f32 run there."""
    said = runpy.run_path(str(ROOT / "docs" / "study.py"))["SAME"]
    study = [setting for setting in said if setting.startswith("precision.")]
    for name, settings in (("study", study), ("f32", ["precision.amp_dtype=none", "precision.fused_attn=true"])):
        process = start(command(world, tmp_path / name, "aal", u8(world), *settings), environment=OLD)
        _, errors = process.communicate(timeout=HANGS)
        assert process.returncode == 0, errors
        assert "precision: f32, fused attention\n" in errors
    assert same(tmp_path / "study", tmp_path / "f32")
    used = {"amp_dtype": "none", "fused_attn": True}
    assert result_of(tmp_path / "study")["precision"] == used
    assert json.loads((tmp_path / "study" / "run.json").read_text())["precision"] == used


def test_a_resumed_run_keeps_its_precision_on_another_processor(world, tmp_path):
    settings = [u8(world), "optim.epochs=1", "precision.amp_dtype=bfloat16", "precision.fused_attn=auto"]
    run(world, tmp_path / "run", "aal", *settings)
    begun = result_of(tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()  # as if killed at the very end
    process = start([*command(world, tmp_path / "run", "aal", *settings), "--resume"], environment=OLD)
    _, errors = process.communicate(timeout=HANGS)
    assert process.returncode == 0, errors
    assert (
        "precision: bfloat16, unfused attention\nwarning: precision.amp_dtype=bfloat16: this processor (AVX2) has no"
        in errors
    )
    assert result_of(tmp_path / "run")["precision"] == begun["precision"]


def test_unfused_bfloat16_gives_about_the_same_losses_and_they_are_f32(world, tmp_path):
    made = parts(world, tmp_path)
    batch = next(made.stream.epoch(0))
    logits, exact = made.distiller(batch)
    precision.apply(made.distiller, precision.PrecisionChoice("bfloat16", False))
    assert [m.fused_attn for m in student_taps.attention_modules(made.distiller.student)] == [False, False]
    rounded, values = made.distiller(batch)
    assert {value.dtype for value in values.values()} == {torch.float32}
    assert not torch.equal(rounded, logits)
    for name in exact:
        assert torch.allclose(values[name], exact[name], rtol=2e-2)
    precision.apply(made.distiller, precision.PrecisionChoice("none", False))
    assert torch.allclose(made.distiller(batch)[0], logits, atol=1e-5)


def test_float16_needs_cuda_and_compilation_a_compiler(world, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"precision\.amp_dtype=float16 needs CUDA .* use bfloat16, none or auto"):
        run(world, tmp_path / "run", "scratch", "precision.amp_dtype=float16")
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match=r"torch\.compile needs a C\+\+ compiler and finds none"):
        run(world, tmp_path / "run", "scratch", "precision.torchcompile=true")


def compiled(world, tmp_path, monkeypatch, backend: str) -> None:
    """Losses, taps and gradients of a compiled student are those of a plain one."""
    made = parts(world, tmp_path)
    batch = next(made.stream.epoch(0))

    def gradients(distiller: Distiller) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        distiller.zero_grad()
        _, values = distiller(batch)
        distiller.total(values, 0).backward()
        return {n: v.item() for n, v in values.items()}, {n: grad(p).clone() for n, p in distiller.named_parameters()}

    plain, slopes = gradients(made.distiller)
    monkeypatch.setattr(precision, "BACKEND", backend)
    names = list(made.distiller.student.state_dict())
    precision.compile_student(made.distiller)
    assert list(made.distiller.student.state_dict()) == names
    for _ in range(2):
        ours, theirs = gradients(made.distiller)
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
    settings = [u8(world), "optim.opt=momentum", "optim.lr=0.01", "model_ema_decay=0.9", "optim.grad_accum_steps=2"]
    plain = run(world, tmp_path / "plain", "aal", *settings)
    quick = run(world, tmp_path / "quick", "aal", *settings, "precision.torchcompile=true")
    assert quick["samples"] == plain["samples"]
    for ours, theirs in zip(log(tmp_path / "plain"), log(tmp_path / "quick"), strict=True):
        assert theirs["losses"] == pytest.approx(ours["losses"], rel=1e-4)
