"""The student: a timm ViT by name, or by explicit sizes; written and read as a timm state dict in safetensors."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import timm
import torch
from pydantic import Field, Strict, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from precompute.taps import takes_image_size
from storage.errors import UserError, first_line, nearest
from storage.files import written_whole
from storage.names import all_normalized
from storage.policies import policy
from storage.schema import Count, Id, Schema, Several, Sha256, Size, Three, checked
from student import config
from student.align import WITH_CLASS
from student.copying import COPIED, copies_in, copies_of
from student.loss_settings import Copying
from student.shifted import shift_patches

_ARGUMENTS = (
    "img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "global_pool", "drop_path_rate",
    "drop_rate", "proj_drop_rate", "attn_drop_rate",
)  # fmt: skip


@dataclass(frozen=True)
class Description:
    """What rebuilds a student: `timm.create_model(model, **arguments)`, and how to feed and read it.

    `shifted_patches` says that its patches are made by `student.shifted`, in place of timm's convolution.
    """

    model: str
    arguments: dict[str, Any]
    img_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    classes: tuple[str, ...] | None
    evaluation: str  # the view policy that it is evaluated on
    shifted_patches: bool = False
    copying: dict[str, Any] | None = None  # of a student that copies attention, what it copies from where

    @property
    def classifies(self) -> bool:
        """Whether it has a classifier; one that was trained without labels gives features."""
        return self.arguments.get("num_classes") != 0


class CopyingRecord(Schema):
    """What a student's file says of what it copies: `student.lending.record_of`."""

    layers: Annotated[Several[Count], Field(min_length=1)]
    heads: Size
    settings: Copying
    store: str
    teacher: str
    targets: Annotated[Several[Id], Field(min_length=1)]
    graphs: Several[Annotated[tuple[Sha256, Count], Strict(False)]]
    permute: int | None

    @model_validator(mode="after")
    def _graphs(self) -> Self:
        if len(self.graphs) != len(self.targets):
            raise ValueError(f"graphs: expected one for each of {len(self.targets)} targets, found {len(self.graphs)}")
        return self


class DescriptionRecord(Schema):
    """What a student's file says: see `Description`."""

    model: str
    arguments: dict[str, Any]
    img_size: Annotated[int, Field(ge=1, le=4096)]
    mean: Three
    std: Three
    classes: Several[str] | None
    evaluation: str
    copying: CopyingRecord | None

    @model_validator(mode="after")
    def _evaluation(self) -> Self:
        try:
            policy(self.evaluation, self.img_size)
        except UserError as error:
            raise ValueError(f"evaluation: expected a view policy, found {error}") from None
        return self


def build(settings: config.Student, num_classes: int) -> tuple[nn.Module, dict[str, Any]]:
    """A new student and the arguments that `timm.create_model` makes it of.

    Raises:
        UserError: an unknown model, or sizes that do not go together.
    """
    if not timm.is_model(settings.model):
        known = timm.list_models()
        longer = min((name for name in known if name.startswith(settings.model)), key=len, default=None)
        family = [name for name in known if name.split("_")[0] == settings.model.split("_")[0]]
        close = difflib.get_close_matches(settings.model, family or known, cutoff=0.5)
        hint = nearest(settings.model, close) if close else f"One that it has: {WITH_CLASS!r}."
        hint = f"Did you mean {longer!r}?" if longer else hint
        raise UserError(f"student.model: timm has no {settings.model!r}. {hint}")
    arguments = {name: getattr(settings, name) for name in _ARGUMENTS if getattr(settings, name) is not None}
    if settings.embed_dim and settings.num_heads and settings.embed_dim % settings.num_heads:
        raise UserError(
            f"student: embed_dim {settings.embed_dim} is no multiple of num_heads {settings.num_heads}; "
            f"change one of them, such as --set student.embed_dim={settings.num_heads * 64}"
        )
    if not takes_image_size(settings.model):
        arguments.pop("img_size", None)
    arguments["num_classes"] = num_classes
    model = create(settings.model, arguments)
    if settings.shifted_patches:
        shift_patches(model)
    embed = getattr(model, "patch_embed", None)
    sizes, patches = (getattr(embed, name, None) for name in ("img_size", "patch_size"))
    for side, patch in (
        zip(sizes, patches, strict=False) if isinstance(sizes, tuple) and isinstance(patches, tuple) else ()
    ):
        if side % patch:
            raise UserError(
                f"student: img_size {side} is no multiple of the patch size {patch} of {settings.model}; "
                f"change one of them, such as --set student.img_size={patch * max(1, round(side / patch))}"
            )
    return model, arguments


def create(model: str, arguments: dict[str, Any]) -> nn.Module:
    """`timm.create_model` with a message that people understand."""
    try:
        made: nn.Module = timm.create_model(model, pretrained=False, **arguments)
    except Exception as error:  # timm raises many kinds
        advice = "change its sizes" if model == WITH_CLASS else f"take a ViT, such as --set student.model={WITH_CLASS}"
        if unknown := _unknown(model, arguments):
            words = " ".join(f"--set student.{name}=null" for name in unknown)
            advice = f"it does not take {', '.join(unknown)}: leave them out ({words}), or {advice}"
        raise UserError(f"student {model} {arguments}: cannot be made: {first_line(error)}; {advice}") from None
    return made


def _unknown(model: str, arguments: dict[str, Any]) -> list[str]:
    """The arguments without which a model can be made; empty where this is not what is wrong."""
    left = dict(arguments)
    unknown: list[str] = []
    while True:
        try:
            with torch.device("meta"):
                timm.create_model(model, pretrained=False, **left)
            return unknown
        except TypeError as error:
            found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if found is None or left.pop(found[1], None) is None:
                return []
            unknown.append(found[1])
        except Exception:  # timm raises many kinds
            return []


def input_size(model: nn.Module, settings: config.Student) -> int:
    """The side of the square images that a student takes."""
    if settings.img_size:
        return settings.img_size
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None)
    if size:
        return int(size[0])
    return int(model.default_cfg["input_size"][-1])  # type: ignore[index]


def save(path: Path, model: nn.Module, description: Description) -> None:
    """Write the state dict with its description, whole or not at all."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if copies := copies_of(model):
        state |= {f"{COPIED}{part}": tensor.detach().cpu().contiguous() for part, tensor in copies.fixed.items()}
    metadata = {
        "format": "pt",
        "model": description.model,
        "arguments": json.dumps(description.arguments),
        "img_size": str(description.img_size),
        "mean": json.dumps(description.mean),
        "std": json.dumps(description.std),
        "classes": json.dumps(description.classes),
        "evaluation": description.evaluation,
        **({"shifted_patches": "true"} if description.shifted_patches else {}),
        **({"copying": json.dumps(description.copying)} if description.copying else {}),
    }
    with written_whole(path) as temporary:
        save_file(state, temporary, metadata)


def load(path: Path) -> tuple[nn.Module, Description]:
    """A student that `save` wrote, in eval mode.

    Raises:
        UserError: no such file, or not a student's.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        said = {name: json.loads(metadata[name]) for name in ("arguments", "img_size", "mean", "std", "classes")}
        said |= {name: metadata[name] for name in ("model", "evaluation")}
        said["copying"] = json.loads(metadata.get("copying", "null"))
        record = checked(DescriptionRecord, said, str(path), "Give a student that `pipeline train` wrote.")
        description = Description(
            record.model, record.arguments, record.img_size, record.mean, record.std,
            tuple(all_normalized(record.classes or ())) or None,
            record.evaluation, metadata.get("shifted_patches") == "true", said["copying"],
        )  # fmt: skip
        copies = copies_in(said["copying"]) if said["copying"] else None
    except FileNotFoundError:
        raise UserError(f"{path}: no student here; `pipeline train` writes one") from None
    except KeyError as error:
        raise UserError(
            f"{path}: not a student that `pipeline train` wrote: its metadata do not tell {first_line(error)}"
        ) from None
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not a student that `pipeline train` wrote ({first_line(error)})") from None
    model = create(description.model, description.arguments)
    if description.shifted_patches:
        shift_patches(model)
    fixed = {name.removeprefix(COPIED): state.pop(name) for name in [*state] if name.startswith(COPIED)}
    try:
        model.load_state_dict(state)
        if copies:
            copies.fixed = fixed
            copies.attach(model)
    except (RuntimeError, IndexError) as error:
        raise UserError(f"{path}: does not fit {description.model}: {first_line(error)}") from None
    return model.eval(), description


def load_classifier(path: Path) -> tuple[nn.Module, Description]:
    """Likewise, of a student that answers with classes.

    Raises:
        UserError: also where it has no classifier.
    """
    model, about = load(path)
    if not about.classifies:
        raise UserError(
            f"{path}: this student was trained without labels and has no classifier; its features are measured by "
            "pipeline evaluate RUN --protocol knn, or probe; labels give it a classifier: pipeline train --recipe "
            f"fine-tune --set student.model={about.model} --set student.pretrained=false --set student.weights={path} …"
        )
    return model, about
