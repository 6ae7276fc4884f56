"""Which device a command computes on."""

from __future__ import annotations

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
