"""The logged scalars of recent steps, which stay on the device until they are needed.

Reading a number makes the host wait for the device. So it is done once for several steps, and before anything that
depends on them is written: what is saved has been found finite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from storage.errors import UserError, setting
from student.distributed import all_gather_objects, all_reduce_sum, world_size


@dataclass(frozen=True, slots=True, kw_only=True)
class StepScalars:
    """The logged scalars of one step, on the device.

    Attributes:
        epoch: of the step.
        step: its number in the epoch.
        names: `loss`, `losses/…` and `metrics/…`.
        values: f32, for each micro-batch one value a name.
    """

    epoch: int
    step: int
    names: tuple[str, ...]
    values: tuple[Tensor, ...]


class StepRecord:
    """Scalars of the steps since they were last fetched.

    Args:
        size: how many steps it holds before they should be fetched.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._steps: list[StepScalars] = []

    @property
    def full(self) -> bool:
        """Whether it holds as many steps as it should."""
        return len(self._steps) >= self.size

    def add(self, scalars: StepScalars) -> None:
        """Keep a step's scalars."""
        self._steps.append(scalars)

    def fetch(self) -> list[dict[str, float]]:
        """The means over each step's micro-batches by name, in one transfer; the record is empty then.

        All ranks call it at the same steps, and all raise if one of them has to.

        Raises:
            UserError: a loss was not finite; it names the first such step.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return []
        numbers = torch.cat([values for step in steps for values in step.values])
        if world_size() > 1:  # every rank learns whether any is to raise
            losses = torch.stack([values[0] for step in steps for values in step.values])
            numbers = torch.cat([numbers, all_reduce_sum((~losses.isfinite()).any().float()[None])])
        fetched = iter(numbers.tolist())
        parts = [[{name: next(fetched) for name in step.names} for _ in step.values] for step in steps]
        bad = (n for n, of_step in enumerate(parts) if not all(math.isfinite(part["loss"]) for part in of_step))
        first = next(bad, None)
        if first is not None or next(fetched, 0.0):
            failure = (len(steps), "") if first is None else (first, _not_finite(steps[first], parts[first]))
            _, message = min(all_gather_objects(failure))
            slower, capped = setting("optim.lr", "X"), setting("optim.clip_grad", 1)
            raise UserError(message, hint=f"Lower the learning rate, {slower}, or cap the gradients, {capped}")
        return [_means(of_step) for of_step in parts]


def _not_finite(step: StepScalars, parts: list[dict[str, float]]) -> str:
    """What went wrong in a step: the losses of its first micro-batch whose total is not finite."""
    values = next(part for part in parts if not math.isfinite(part["loss"]))
    losses = [(name, value) for name, value in values.items() if name.startswith("losses/")]
    text = ", ".join(f"{name.partition('/')[2]} {value:g}" for name, value in losses)
    return f"epoch {step.epoch}, step {step.step}: the loss is not finite ({text})"


def _means(parts: list[dict[str, float]]) -> dict[str, float]:
    """Name -> its mean over micro-batches."""
    means = dict.fromkeys(parts[0], 0.0)
    for part in parts:
        for name, value in part.items():
            means[name] += value / len(parts)  # not by `sum`, which rounds otherwise from Python 3.12 on
    return means
