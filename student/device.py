"""Which device a command computes on, and what its processor can do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from storage.errors import UserError


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises UserError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda") or name.startswith("cpu:"):
        raise UserError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        seen = f"{count} CUDA device(s), counted from 0" if count else "no CUDA device; use cpu or auto"
        raise UserError(f"--device {name}: this torch sees {seen}")
    return device


@dataclass(frozen=True)
class Processor:
    """What torch uses of a CPU.

    Attributes:
        level: of vector instructions in torch's own kernels: DEFAULT, AVX2, AVX512 …; `ATEN_CPU_CAPABILITY` lowers it.
        flags: instructions that the CPU has, by torch's names.
        onednn: whether oneDNN, which multiplies matrices, takes bfloat16; `ONEDNN_MAX_CPU_ISA` lowers it.
    """

    level: str
    flags: Mapping[str, Any]
    onednn: bool

    @classmethod
    def here(cls) -> Processor:
        """This machine's."""
        if hasattr(torch.cpu, "get_capabilities"):
            flags = torch.cpu.get_capabilities()
        else:  # torch before 2.11
            flags = {"avx512_bf16": torch.cpu._is_avx512_bf16_supported()}
        supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
        return cls(torch.backends.cpu.get_cpu_capability(), flags, bool(supported and supported()))

    @property
    def bfloat16(self) -> bool:
        """Whether it has instructions that multiply bfloat16. oneDNN takes it without them, too, but slowly."""
        if not self.onednn:
            return False
        if self.flags.get("bf16"):  # ARM
            return True
        wide = self.level.startswith(("AVX512", "AVX10"))
        return wide and any(self.flags.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
