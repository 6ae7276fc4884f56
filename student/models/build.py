"""Building a student: a timm network by name, or by explicit sizes."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, Any, cast

import timm
import torch

from precompute.taps import FACTORY_ARGUMENTS, constructor_arguments, create_timm_model, takes, takes_image_size
from storage.constants import SHORT_NAMES
from storage.errors import UserError, did_you_mean, setting
from storage.objects.network_names import outside_timm
from storage.objects.state_dict import ONNX_FILE
from student.models.fixed_positions import SINCOS, fix_positions
from student.models.outside_timm import build_outside_timm, create_outside_timm, names_outside_timm, recorded_name
from student.models.shifted_patch import shift_patches
from student.settings import DROP_RATES, SIZES, WITH_CLASS, StudentConfig

if TYPE_CHECKING:
    from torch import nn

    from storage.store.manifests import TeacherIdentity


def architecture(settings: StudentConfig, teacher: TeacherIdentity | None) -> StudentConfig:
    """The settings with what `like` stands for as their model and arguments; as they are without it.

    Sizes and arguments that the settings say themselves count.

    Args:
        settings: the section `student` of a recipe.
        teacher: that `like` names, where a store or a project has it; else `like` is a short name or a timm name.

    Raises:
        UserError: the teacher is a ready graph or a network outside timm.
    """
    if settings.like is None:
        return settings
    if teacher is None:
        return settings.model_copy(update={"model": SHORT_NAMES.get(settings.like, (settings.like,))[0]})
    if not timm.is_model(teacher.model):
        kind = "a ready graph" if teacher.model == ONNX_FILE else teacher.model
        raise UserError(
            f"student.like: {settings.like} is {kind}, which is not made by a name of timm's",
            hint=f"Take timm's network that is like it: {setting('student.like', 'NAME')}",
        )
    sizes = {n: v for n, v in teacher.arguments.items() if n in SIZES and getattr(settings, n) is None}
    args = {name: value for name, value in teacher.arguments.items() if name not in StudentConfig.model_fields}
    return settings.model_copy(update={"model": teacher.model, **sizes, "args": {**args, **settings.args}})


def build_student(settings: StudentConfig, num_classes: int) -> tuple[nn.Module, dict[str, Any]]:
    """A new student and the arguments that `timm.create_model` makes it of.

    A network outside timm is made by `student.models.outside_timm`.

    Args:
        settings: the section `student` of a recipe, after `architecture`.
        num_classes: outputs of the classifier; 0 for none.

    Raises:
        UserError: an unknown model, arguments that it does not take, or sizes that do not go together.
    """
    if names_outside_timm(settings.model):
        return build_outside_timm(settings, num_classes)
    if not timm.is_model(settings.model):
        known = timm.list_models()
        longer = min((name for name in known if name.startswith(settings.model)), key=len, default=None)
        family = [name for name in known if name.split("_")[0] == settings.model.split("_")[0]]
        close = difflib.get_close_matches(settings.model, family or known, cutoff=0.5)
        hint = did_you_mean(settings.model, close) if close else f"One that it has: {WITH_CLASS!r}."
        hint = f"Did you mean {longer!r}?" if longer else hint
        where, store = ("like", ", and the store no such teacher") if settings.like else ("model", "")
        raise UserError(f"student.{where}: timm has no {settings.model!r}{store}. {hint}")
    arguments = settings.sizes
    if settings.embed_dim and settings.num_heads and settings.embed_dim % settings.num_heads:
        problem = f"student: embed_dim {settings.embed_dim} is not a multiple of num_heads {settings.num_heads}"
        wide = setting("student.embed_dim", settings.num_heads * 64)
        raise UserError(problem, hint=f"Change one of them, such as {wide}")
    if not takes_image_size(settings.model):
        arguments.pop("img_size", None)
    arguments |= settings.args
    fixed_positions = arguments.get("pos_embed") == SINCOS and arguments.pop("pos_embed")
    arguments["num_classes"] = num_classes
    model = create(settings.model, arguments)
    if settings.shifted_patches:
        shift_patches(model)
    embed = getattr(model, "patch_embed", None)
    sides = [getattr(embed, name, None) for name in ("img_size", "patch_size")]
    sizes, patches = (value if isinstance(value, tuple) else () for value in sides)
    for side, patch in zip(sizes, patches, strict=False):
        if side % patch:
            problem = f"student: img_size {side} is not a multiple of the patch size {patch} of {settings.model}"
            multiple = setting("student.img_size", patch * max(1, round(side / patch)))
            raise UserError(problem, hint=f"Change one of them, such as {multiple}")
    if fixed_positions:
        fix_positions(model)
    return model, arguments


def create(model: str, arguments: dict[str, Any]) -> nn.Module:
    """A student's network. Raises UserError: timm does not make it, with what to change."""
    if outside_timm(model):
        return create_outside_timm(model, arguments, f"student {model}")
    for name in arguments.keys() & FACTORY_ARGUMENTS:
        raise UserError(f"student.args.{name}: not an argument of a network that learns from images; leave it out")
    try:
        return create_timm_model(model, arguments, owner=f"student {model}")
    except UserError as error:
        hint = f"Take a ViT, such as {setting('student.model', WITH_CLASS)}"
        if model == WITH_CLASS:
            hint = "Change its sizes."
        unknown = _unknown(model, arguments)
        further = [name for name in unknown or arguments if name not in StudentConfig.model_fields]
        if not unknown:
            further = [n for n in further if not _failure(model, {k: v for k, v in arguments.items() if k != n})]
        if further:
            name = further[0]
            hint = f"Change {setting(f'student.args.{name}', 'VALUE')}, or leave it out."
            if unknown:
                hint = did_you_mean(name, _known(model, {n: v for n, v in arguments.items() if n not in unknown}))
                raise UserError(f"student.args.{name}: {model} has no such argument", hint=hint) from None
        elif unknown:
            nulls = " ".join(setting(f"student.{name}", "null") for name in unknown)
            hint = f"It does not take {', '.join(unknown)}. Leave them out: {nulls}\n  Or {hint[0].lower()}{hint[1:]}"
        raise UserError(error.message, hint=hint) from None


def not_taken(model: str, settings: dict[str, Any]) -> list[str]:
    """The sizes and drop rates, of some settings, that a network cannot be made with."""
    sizes = {name: settings[name] for name in (SIZES | DROP_RATES) - {"img_size"} if settings.get(name) is not None}
    if names_outside_timm(model):
        label = recorded_name(model)
        return sorted(name for name in sizes if not takes(label, name))
    model = SHORT_NAMES.get(model, (model,))[0]
    if not sizes or not timm.is_model(model):
        return []
    unknown = _unknown(model, sizes)
    known = {name: size for name, size in sizes.items() if name not in unknown}
    return sorted(sizes if _failure(model, known) else unknown)  # it fails for heads that Swin has in stages


def _on_meta(model: str, arguments: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return cast("nn.Module", timm.create_model(model, pretrained=False, **arguments))


def _known(model: str, arguments: dict[str, Any]) -> set[str]:
    """The arguments that may be in `student.args`."""
    return constructor_arguments(_on_meta(model, arguments)) - {*StudentConfig.model_fields}


def _failure(model: str, arguments: dict[str, Any]) -> Exception | None:
    """Why a model cannot be made of these arguments; None where it can."""
    try:
        _on_meta(model, arguments)
    except Exception as error:  # timm raises many kinds
        return error
    return None


def _unknown(model: str, arguments: dict[str, Any]) -> list[str]:
    """The arguments without which a model can be made; empty where this is not what is wrong."""
    rest = dict(arguments)
    while (error := _failure(model, rest)) is not None:
        unexpected = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if not isinstance(error, TypeError) or unexpected is None or rest.pop(unexpected[1], None) is None:
            return []
    return [name for name in arguments if name not in rest]
