"""How the student is computed: precision, attention kernel and compilation.

Nothing is decided by a stopwatch. A recipe says the precision, float32 unless it says another; `auto`, where it is
asked for, is a rule on what the device computes natively, is said, and is kept when the run is resumed.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from storage.errors import UserError, setting
from student.alignment.student_taps import attention_modules
from student.distributed import Processor

if TYPE_CHECKING:
    from student.recipe import schema
    from student.training.distiller import Distiller

BACKEND = "inductor"  # of torch.compile

SLOWER = "10 to 35"  # times: bfloat16 steps of small students on processors with AVX2 alone, measured

_TYPES = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class PrecisionChoice:
    """What is used, also in checkpoints: a precision (none: float32), and whether the attention kernel is fused."""

    amp_dtype: str
    fused_attn: bool

    @property
    def kernel(self) -> str:
        """The attention kernel, human-readable."""
        return f"{'fused' if self.fused_attn else 'unfused'} attention"


def check(settings: schema.PrecisionConfig, device: torch.device) -> None:
    """Refuse what cannot be, before anything is spent. Raises UserError."""
    if settings.amp_dtype == "float16" and device.type != "cuda":
        raise UserError(
            f"precision.amp_dtype=float16 needs CUDA (its gradients are scaled), this run is on {device}; "
            "use bfloat16, none or auto"
        )
    if settings.torchcompile and device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++", "cl"))):
        missing = "torch.compile needs a C++ compiler and finds none (g++ or clang++); install one"
        raise UserError(f"precision.torchcompile: {missing}")


def apply(distiller: Distiller, choice: PrecisionChoice) -> None:
    """Compute the student in this way from now on."""
    distiller.precision = _TYPES[choice.amp_dtype]
    for module in attention_modules(distiller.student):
        module.fused_attn = choice.fused_attn  # type: ignore[assignment]


def compile_student(distiller: Distiller) -> None:
    """Compile the student in place; names in its state dict stay as they are."""
    distiller.student.compile(backend=BACKEND)


def choose(
    settings: schema.PrecisionConfig, device: torch.device, processor: Processor | None = None
) -> PrecisionChoice:
    """What the settings stand for on a device.

    `amp_dtype: auto` is bfloat16 where the device has instructions for it, else float16 on a GPU with tensor cores,
    else float32. `fused_attn: auto` is the unfused kernel for bfloat16 on a CPU, which takes half the time there, and
    the fused one everywhere else.

    Args:
        settings: what is not `auto` stays as it is.
        device: where it will run.
        processor: the CPU; this machine's by default.
    """
    amp_dtype, fused_attn = settings.amp_dtype, settings.fused_attn
    if amp_dtype == "auto":
        amp_dtype = _native(device, processor or Processor.here())
    if fused_attn == "auto":
        fused_attn = amp_dtype != "bfloat16" or device.type != "cpu"
    return PrecisionChoice(amp_dtype, fused_attn)


def lines(choice: PrecisionChoice, device: torch.device, processor: Processor | None = None) -> list[str]:
    """What is used, human-readable, with a warning where it is slow and a hint where another may be faster."""
    processor = processor or Processor.here()
    native = _native(device, processor)
    text = f"precision: {'f32' if choice.amp_dtype == 'none' else choice.amp_dtype}, {choice.kernel}"
    if choice.amp_dtype == "none" and native != "none":
        text += f"; {native} can be faster on this device: {setting('precision.amp_dtype', 'auto')} in a new run"
    if choice.amp_dtype != "bfloat16" or native == "bfloat16":
        return [text]
    what = f"this processor ({processor.level}) has no bf16 instructions; steps there took {SLOWER} times as long as"
    if device.type == "cuda":
        what = "this GPU has no bf16 instructions, so steps may take longer than"
    hint = f"for f32 begin a new run with {setting('precision.amp_dtype', 'none')}"
    return [text, f"warning: precision.amp_dtype=bfloat16: {what} in f32; {hint}"]


def _native(device: torch.device, processor: Processor) -> Literal["none", "bfloat16", "float16"]:
    """The lowest precision that a device computes natively."""
    if device.type == "cpu":
        return "bfloat16" if processor.bfloat16 else "none"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16"
    return "float16" if torch.cuda.get_device_capability(device) >= (7, 0) else "none"  # tensor cores
