"""timm's optimizer and schedule: no decay for biases, norms and embeddings, rates by layer where they are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from storage.errors import UserError, did_you_mean, first_line

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from student.recipe.schema import Recipe
    from student.training.distiller import Distiller


_KERNELS = ("fused", "foreach")


def peak_learning_rate(recipe: Recipe) -> float:
    """The largest learning rate, `lr` or `lr_base` scaled linearly with the batch."""
    settings = recipe.optim
    return settings.lr or settings.lr_base * recipe.stream.batch_size / settings.lr_base_size


def build_optimizer(recipe: Recipe, distiller: Distiller, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    """timm's optimizer over what is not frozen, and its schedule by updates.

    With `layer_decay` the rate of each of the student's layers is `layer_decay` times that of the next one; the losses'
    own parameters have the full rate.

    Args:
        recipe: what is wanted.
        distiller: with the student and the losses' parameters.
        steps: updates in an epoch.

    Raises:
        UserError: an unknown optimizer, or settings that it does not take.
    """
    from timm.optim import create_optimizer_v2, list_optimizers
    from timm.scheduler import create_scheduler_v2

    settings = recipe.optim
    arguments: dict[str, Any] = {"lr": peak_learning_rate(recipe), "weight_decay": settings.weight_decay}
    if settings.opt_betas is not None:
        arguments["betas"] = settings.opt_betas
    if next(distiller.parameters()).device.type == "cuda" and _has_fused(settings.opt):
        arguments["fused"] = True
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            _groups(recipe, distiller), opt=settings.opt, **arguments
        )
    except (ValueError, AssertionError, RuntimeError, TypeError) as error:
        known = did_you_mean(settings.opt, list_optimizers())
        raise UserError(f"optim.opt: {settings.opt}: {first_line(error)}. {known}") from None
    if settings.opt_betas is not None and tuple(optimizer.param_groups[0].get("betas", ())) != settings.opt_betas:
        raise UserError(f"optim.opt_betas: {settings.opt} does not take them")
    scheduler, _ = create_scheduler_v2(
        optimizer,
        settings.sched,
        num_epochs=settings.epochs,
        warmup_epochs=settings.warmup_epochs,
        warmup_lr=settings.warmup_lr,
        min_lr=settings.min_lr,
        step_on_epochs=False,
        updates_per_epoch=steps,
    )
    return optimizer, scheduler


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Restore a saved state, which may be of another device: whether kernels are fused is up to this one.

    Raises:
        ValueError: the state is of other parameters.
    """
    saved, own = state["param_groups"], optimizer.param_groups
    if len(saved) == len(own):
        kernels = [{name: group[name] for name in _KERNELS if name in group} for group in own]
        saved = [{**group, **choice} for group, choice in zip(saved, kernels, strict=True)]
    optimizer.load_state_dict({**state, "param_groups": saved})


def _has_fused(name: str) -> bool:
    """Whether PyTorch updates all parameters in one kernel on a GPU."""
    from timm.optim import get_optimizer_info, list_optimizers
    from torch.optim import SGD, Adam, AdamW

    return name in list_optimizers() and get_optimizer_info(name).opt_class in (Adam, AdamW, SGD)


def _groups(recipe: Recipe, distiller: Distiller) -> list[dict[str, Any]]:
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    decay, scale = recipe.optim.weight_decay, recipe.optim.layer_decay
    exempt = set(getattr(distiller.student, "no_weight_decay", set)())
    if scale is None:
        return list(param_groups_weight_decay(distiller, decay, {f"student.{name}" for name in exempt}))
    layers = param_groups_layer_decay(distiller.student, decay, exempt, layer_decay=scale)
    own = param_groups_weight_decay(distiller.losses, decay)
    return [*layers, *({**group, "lr_scale": 1.0} for group in own)]


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate now, before it is scaled by layer."""
    group = optimizer.param_groups[0]
    return float(group["lr"] / group.get("lr_scale", 1.0))
