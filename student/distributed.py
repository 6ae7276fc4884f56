"""Several processes that train one student together (torchrun): which of them this is, and what they tell each other.

Alone, without torchrun, everything here is the identity.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from storage.errors import UserError, setting

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

T = TypeVar("T")

# Seconds that a rank waits to be ended after the one that says what went wrong; an interrupt ends all anyway.
GRACE, INTERRUPTED = 60.0, 1.0


def rank() -> int:
    """The number of this process; 0 alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def process_group(device: str) -> Iterator[torch.device]:
    """The device of this process, which torchrun's other processes are connected to meanwhile.

    What goes wrong on any rank ends all, and one of them says it: the others leave with status 1 in silence.

    Args:
        device: as `pick_device` takes; `cuda` is the GPU of this process's number on its machine.
    """
    where = pick_device(device)
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        yield where
        return
    if where.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0)) if where.index is None else where.index
        if local >= torch.cuda.device_count():
            raise UserError(
                f"rank {os.environ['RANK']}: there are {torch.cuda.device_count()} CUDA device(s) on this machine",
                hint="Start no more processes on each node than that (torchrun's option nproc-per-node).",
            )
        where = torch.device("cuda", local)
        torch.cuda.set_device(where)
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    try:
        yield where
        dist.barrier()
    except BaseException as error:
        if not _speaks_first():
            # Leaving no sooner than the one that speaks: torchrun ends all once one has left.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(INTERRUPTED if isinstance(error, KeyboardInterrupt) else GRACE)
            raise SystemExit(1) from None
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            raise UserError(
                f"rank {dist.get_rank()}: another rank ended without an error message (killed, or out of memory?)",
                hint=f"Run the same command again with {setting('resume', True)} to resume from the last checkpoint.",
            ) from None
        raise
    dist.destroy_process_group()  # not after an error: it could wait for those that are gone


def _speaks_first() -> bool:
    """Whether no other rank has told yet what went wrong."""
    try:
        store = dist.distributed_c10d._get_default_store()  # noqa: SLF001 - PyTorch gives it in no other way
        return bool(store.add("teacher-store: told", 1) == 1)
    except Exception:  # whoever kept the store is gone, and has told
        return dist.get_rank() == 0


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum over all ranks, on every rank."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def all_reduce_mean(numbers: dict[str, float], device: torch.device) -> dict[str, float]:
    """The mean of each number over all ranks; every rank has the same names."""
    if world_size() == 1 or not numbers:
        return numbers
    values = all_reduce_sum(torch.tensor(list(numbers.values()), dtype=torch.float64, device=device)) / world_size()
    return dict(zip(numbers, values.tolist(), strict=True))


def broadcast_object(value: T) -> T:
    """What rank 0 has."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def all_gather_objects(value: T) -> list[T]:
    """What every rank has, in the order of the ranks."""
    if world_size() == 1:
        return [value]
    gathered = [value] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def all_gather_rows(values: Tensor, lanes: int) -> Tensor:
    """The rows `[n, …]` of the whole batch on every rank, in the order that one rank alone gives them: lane after lane.

    Args:
        values: this rank's rows of a batch, its lanes (those ≡ rank mod ranks) one after another; as many on all ranks.
        lanes: of the stream.
    """
    if world_size() == 1:
        return values
    gathered = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(gathered, values.contiguous())
    by_lane = torch.stack(gathered).view(world_size(), lanes // world_size(), -1, *values.shape[1:])
    return by_lane.transpose(0, 1).flatten(0, 2)


def broadcast_buffers(module: nn.Module) -> None:
    """Give every rank the buffers of rank 0, such as running statistics, so that all evaluate one student."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises UserError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda") or name.startswith("cpu:"):
        raise UserError("expected auto, cpu, cuda or cuda:N", setting=setting("device", name))
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        devices = f"{count} CUDA device(s), counted from 0" if count else "no CUDA device; use cpu or auto"
        raise UserError(f"this torch sees {devices}", setting=setting("device", name))
    return device


@dataclass(frozen=True, slots=True, kw_only=True)
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
            flags = {"avx512_bf16": torch.cpu._is_avx512_bf16_supported()}  # noqa: SLF001
        supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
        return cls(level=torch.backends.cpu.get_cpu_capability(), flags=flags, onednn=supported())

    @property
    def bfloat16(self) -> bool:
        """Whether it has instructions that multiply bfloat16. oneDNN takes it without them, too, but slowly."""
        names = ["bf16"]  # of ARM
        if self.level.startswith(("AVX512", "AVX10")):
            names += ["avx512_bf16", "amx_bf16"]
        return self.onednn and any(self.flags.get(name) for name in names)
