"""One update of a student: forward and backward over micro-batches, clipping, optimizer, weight average."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from student.data.shuffle import default_lanes
from student.distributed import world_size
from student.training.step_record import StepScalars

if TYPE_CHECKING:
    from student.data.batch import Batch
    from student.recipe.schema import Recipe
    from student.training.distiller import Distiller


class _Total(nn.Module):
    """The total as one forward pass, so that DistributedDataParallel sees exactly the graph that is trained."""

    def __init__(self, distiller: Distiller) -> None:
        super().__init__()
        self.distiller = distiller

    def forward(self, batch: Batch, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The total, and each loss without its gradient."""
        _, values = self.distiller(batch)
        return self.distiller.total(values, epoch), {name: value.detach() for name, value in values.items()}


class Update:
    """Makes updates of a distiller's parameters.

    Args:
        recipe: with `optim.grad_accum_steps` and `optim.clip_grad`.
        distiller: on its device.
        optimizer: of its parameters.
        average: timm's EMA of the student, or None.
        device: of the distiller.
        scaled: whether gradients are scaled, as float16 needs.
    """

    def __init__(
        self,
        recipe: Recipe,
        distiller: Distiller,
        optimizer: torch.optim.Optimizer,
        *,
        average: Any,
        device: torch.device,
        scaled: bool,
    ) -> None:
        self.settings, self.distiller, self.optimizer, self.average = recipe.optim, distiller, optimizer, average
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)
        self.lanes = recipe.stream.lanes or default_lanes(recipe.stream.batch_size)
        self.total: nn.Module = _Total(distiller)
        if world_size() > 1:
            devices = [device] if device.type == "cuda" else None
            self.total = DistributedDataParallel(self.total, device_ids=devices, find_unused_parameters=True)

    def __call__(self, batch: Batch, epoch: int, step: int) -> StepScalars:
        """One update, of which nothing is read back.

        Args:
            batch: this rank's, on the device.
            epoch: of the step; weights of losses depend on it.
            step: its number in the epoch.

        Returns:
            `loss`, `losses/…` and `metrics/…` of this rank's batch, on the device; not checked for being finite.
        """
        count = self.settings.grad_accum_steps
        size = len(batch.labels) // count
        self.optimizer.zero_grad()
        scalars: list[dict[str, Tensor]] = []
        offered: list[list[Tensor]] = []
        for number in range(count):
            accumulates = isinstance(self.total, DistributedDataParallel) and number < count - 1
            with self.total.no_sync() if accumulates else nullcontext():  # type: ignore[operator]
                loss, values = self.total(batch.part(slice(number * size, (number + 1) * size)), epoch)
                scalars.append(self._scalars(loss, values))
                self.scaler.scale(loss / count).backward()
            offered.append([queue.offered for queue in self.distiller.queues])
        if self.settings.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.distiller.parameters(), self.settings.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for number, queue in enumerate(self.distiller.queues):
            queue.push([vectors[number] for vectors in offered], self.lanes)
        if self.average is not None:
            self.average.update(self.distiller.student)
        stacked = tuple(torch.stack([value.float() for value in part.values()]) for part in scalars)
        return StepScalars(epoch=epoch, step=step, names=tuple(scalars[0]), values=stacked)

    def _scalars(self, loss: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The logged scalars of a micro-batch."""
        named = {"loss": loss.detach(), **{f"losses/{name}": value for name, value in values.items()}}
        return named | {f"metrics/{name}": value.detach() for name, value in self.distiller.metrics.items()}
