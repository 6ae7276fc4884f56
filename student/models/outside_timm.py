"""Students that timm does not have: a network of one's own or torchvision's, how it is made, kept and made again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from precompute.taps import (
    adapt,
    allow_network,
    config_of_own,
    create_timm_model,
    given,
    not_given,
    run_blank,
    takes,
    torchvision_config,
)
from storage.errors import UserError, setting
from storage.objects.network_names import TORCHVISION, bare, is_own, is_recorded

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import nn

    from student.settings import StudentConfig

_OFFERED = ("img_size", "num_classes")  # arguments that a function gets where it has them


def names_outside_timm(model: str) -> bool:
    """Whether a recipe's `student.model` is a function of one's own, or one of torchvision's networks."""
    return is_own(model) or model.startswith(TORCHVISION)


def recorded_name(model: str) -> str:
    """What a student's file calls the network of a recipe's `student.model`; the file of a function is run."""
    return allow_network(model).label if is_own(model) else model


def build_outside_timm(settings: StudentConfig, num_classes: int) -> tuple[nn.Module, dict[str, Any]]:
    """A new student that timm does not have, and the arguments that it is made of.

    The recipe's sizes are arguments of the function; it gets `num_classes` and `img_size` where it has them.

    Args:
        settings: the section `student` of a recipe, which is the user's: its function is run.
        num_classes: outputs of the classifier; 0 for none.

    Raises:
        UserError: no such network, or it does not take such images or classes.
    """
    if settings.pretrained and is_own(settings.model):
        raise UserError("student.pretrained: a function has no weights to download; give a file as student.weights")
    if settings.shifted_patches:
        raise UserError(f"student.shifted_patches: only for networks of timm, not {settings.model}")
    model, owner = recorded_name(settings.model), f"student {settings.model}"
    arguments = {**settings.sizes, **settings.args, "num_classes": num_classes}
    tried = settings.args if model.startswith(TORCHVISION) else {}  # torchvision says by itself what does not fit
    if unknown := [name for name in arguments if name not in (*_OFFERED, *tried) and not takes(model, name)]:
        where = {name: f"student.{'args.' * (name in settings.args)}{name}" for name in unknown}
        nulls = " ".join(setting(path, "null") for path in where.values())
        raise UserError(f"{owner}: it does not take {', '.join(unknown)}", hint=f"Leave them out: {nulls}")
    network = create_outside_timm(model, arguments, owner)
    size = settings.img_size or (config_of_own(network).get("input_size") or [None])[-1]
    if size is None:
        hint = f"Give {setting('student.img_size', 'N')}, or let it have pretrained_cfg."
        raise UserError(f"{owner}: the size of its images is not known", hint=hint)
    adapt(network, size=int(size), owner=owner)
    if num_classes and (outputs := run_blank(network, int(size)).shape[-1]) != num_classes:
        hint = "" if takes(model, "num_classes") else "Let its function take num_classes."
        raise UserError(f"{owner}: it outputs {outputs} values, and there are {num_classes} classes", hint=hint)
    return network, arguments


def create_outside_timm(model: str, arguments: Mapping[str, Any], owner: str, copy: str = "") -> nn.Module:
    """A student's network by its recorded name; `copy` is the file that its run keeps, for an error to name.

    Raises:
        UserError: a function that the user does not name, and as `build_network`.
    """
    if is_recorded(model) and given(model) is None:
        raise not_given(model, owner, copy)
    taken = {name: value for name, value in arguments.items() if name not in _OFFERED or takes(model, name)}
    network = create_timm_model(model, taken, owner=owner)
    if taken.get("num_classes") == 0:
        network.num_classes = 0  # type: ignore[assignment]  # it has no classifier, whatever it says of itself
    return network


def recorded_config(settings: StudentConfig, network: nn.Module) -> dict[str, Any]:
    """What a network outside timm says of its given weights, such as `mean` and `std`."""
    if settings.model.startswith(TORCHVISION):
        return torchvision_config(settings.model, "student") if settings.pretrained else {}
    return config_of_own(network)


def keep_source(model: str, file: Path) -> str:
    """Keep the file of a student's function in its run, and say what is needed to make the network again.

    The copy is for reading and for the day when the file is lost: nothing runs it unless the user names it.
    """
    source = given(model)
    if source is None or not is_recorded(model):
        return ""
    again = f"{bare(model)} makes the network of this student; commands ask for it by {setting('network', bare(model))}"
    file.write_bytes(source.text)
    return f"{again}; a copy is {file}"
