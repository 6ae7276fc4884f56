"""Teachers: a network with its weights, arguments, input size, mean/std and classes. No torch until one is loaded."""

from __future__ import annotations

import contextlib
import difflib
import functools
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from precompute.teachers import weights as taken
from precompute.teachers.onnx_file import is_onnx_file, read_graph
from storage.constants import SHORT_NAMES
from storage.errors import UserError, call, did_you_mean, first_line, setting
from storage.objects import json_record
from storage.objects.checkpoint_file import EARLIER
from storage.objects.network_names import BUILT, TORCHVISION, is_own, is_recorded, outside_timm
from storage.objects.state_dict import HUB, ONNX_FILE, digest_of_state, load_weights
from storage.objects.weights_file import WeightsFile, is_random, random_seed
from storage.store.manifests import Anatomy, TeacherIdentity, TeacherManifest
from storage.store.markers import FORMAT

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

ROLES = ("class", "distillation", "register")  # of tokens before the patches


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """What names one network exactly.

    Attributes:
        name: what the store calls it.
        model: timm's name; `onnx` for a ready graph; of a network of one's own what `OwnNetwork.label` says.
        arguments: of `timm.create_model`.
        weights: a file (a ready graph itself), `random:SEED`, or None for timm's hub, and those that a network of one's
            own is built with.
        digest: sha256 of the weights file; of all tensors where there is no file.
        input_size: side of the square input.
        mean: of the input, per channel.
        std: of the input, per channel.
        classes: names, where the file of weights has them.
        weights_key: of the dictionary that is taken of the file; None for the one that `EARLIER` finds.
        prefix: roles of the tokens before the patches; None for what the network says.
        tap_modules: whose outputs are the maps of a network outside timm.
    """

    name: str
    model: str
    arguments: dict[str, Any] = field(hash=False)
    weights: str | None
    digest: str
    input_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    classes: tuple[str, ...] | None = None
    weights_key: str | None = None
    prefix: tuple[str, ...] | None = None
    tap_modules: tuple[str, ...] = ()

    @property
    def identity(self) -> TeacherIdentity:
        """What makes two teachers the same teacher."""
        said = {"weights_key": self.weights_key, "prefix": self.prefix, "tap_modules": self.tap_modules or None}
        more: dict[str, Any] = {name: value for name, value in said.items() if value is not None}
        return TeacherIdentity(
            model=self.model,
            arguments=self.arguments,
            weights_sha256=self.digest,
            input_size=self.input_size,
            mean=self.mean,
            std=self.std,
            **more,
        )

    @property
    def ready(self) -> bool:
        """Whether it is a graph in a file, and no network of timm."""
        return self.model == ONNX_FILE

    @property
    def id(self) -> str:
        """Digest of the identity; part of every target's id."""
        return self.identity.digest

    def manifest(self, anatomy: Anatomy) -> TeacherManifest:
        """What a store says of it: beside its identity where it came from, and what its network is made of."""
        return TeacherManifest(
            format=FORMAT,
            kind="teacher",
            id=self.name,
            identity=self.identity,
            weights=self.weights or (BUILT if is_recorded(self.model) else HUB),
            classes=self.classes or None,
            **anatomy.plain(),
        )


def find_teacher(
    name: str,
    *,
    weights: str | None = None,
    arguments: dict[str, Any] | None = None,
    input_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    teacher_name: str | None = None,
    weights_key: str | None = None,
    prefix: Sequence[str] | None = None,
    tap_modules: Sequence[str] = (),
    say: Callable[[str], None] = lambda _line: None,
) -> Teacher:
    """The teacher of a name; what is not given comes from timm's record of the weights.

    A network outside timm is `FILE.py:FUNCTION` or `MODULE:FUNCTION`, whose code is run, or `torchvision/NAME`.

    Args:
        name: a short name, any timm name, `hf-hub:USER/NAME`, `local-dir:FOLDER`, a file that ends in `.onnx`, a
            ready graph, or a network outside timm.
        weights: a `.safetensors` or `.pth` file; `random:SEED` for the untrained weights of a seed; None for timm's
            hub, which without a network is tried for most of a minute, and for those that a function builds.
        arguments: of `timm.create_model`, or the function; `num_classes=0` is added where a file has no classifier.
        input_size: side of the square input.
        mean: of the input, one number or three.
        std: of the input, one number or three.
        teacher_name: what the store calls the teacher; None for its name.
        weights_key: which of several dictionaries of weights in the file is taken, or the first parts of the names
            that are taken; None for the one that timm takes.
        prefix: of a network outside timm, the role of each token before the patches: class, distillation or register;
            None for what its `num_prefix_tokens` says.
        tap_modules: of a network outside timm, the modules whose outputs are its maps.
        say: called with human-readable lines: which weights are taken, what of their names was stripped or renamed.

    Raises:
        UserError: an unknown name, a weights file that is not there or has no weights under this key, a seed that is no
            number, a size, mean/std or argument that makes no sense.
    """
    arguments = arguments or {}
    if is_onnx_file(name):
        names = ",".join(arguments)
        for option, value in {"weights": weights, "weights_key": weights_key, "teacher_arg": names}.items():
            if value:
                message = f"{name} is a ready graph, which holds its own weights and arguments"
                raise UserError(message, setting=setting(option, value))
        return _find_ready(name, input_size, mean, std, _checked_name(Path(name).stem, teacher_name))
    model, size = resolve(name)
    require_outside(model, prefix, tap_modules)
    if name not in SHORT_NAMES or mean is None or std is None:
        config = about_weights(model, name, {**sized(model, input_size), **arguments})
        size, mean, std = size or config.size, mean or config.mean, std or config.std
        if outside_timm(model):
            require_said(name, input_size=size or input_size or arguments.get("img_size"), mean=mean, std=std)
    _require_size(input_size)
    try:
        json_record.canonical(arguments)
    except (TypeError, ValueError) as error:
        message = f"{first_line(error)}; expected numbers, words, lists and mappings of these"
        raise UserError(message, setting=setting("teacher_arg", "NAME=VALUE")) from None
    own = arguments.get("img_size", input_size)
    if input_size not in (None, own):
        other = setting("teacher_arg", f"img_size={own}")
        raise UserError(f"{other} says something else", setting=setting("input_size", input_size))
    input_size = own if isinstance(own, int) else input_size
    teacher = Teacher(
        name=_checked_name(name, teacher_name),
        model=model,
        arguments=arguments,
        weights=weights,
        digest="",
        input_size=int(input_size or size or 224),
        mean=_three(mean, "mean"),
        std=_three(std, "std"),
        weights_key=weights_key,
        prefix=None if prefix is None else tuple(prefix),
        tap_modules=tuple(tap_modules),
    )
    if weights is not None and not is_random(weights):
        file = WeightsFile(weights)
        teacher = replace(teacher, digest=file.digest)
        key, chosen = taken.choose(file, weights_key, say)
        fitting = taken.fitting_arguments(lambda: _network(teacher), arguments, file, chosen, say)
        return replace(teacher, weights_key=key, arguments=fitting, classes=file.classes)  # read with the tensors
    if weights_key is not None:
        hint = f"Give one by {setting('weights', 'F')}"
        raise UserError("there is no file of weights", setting=setting("weights_key", weights_key), hint=hint)
    return replace(teacher, digest=_digest_without_file(teacher, say))


def _digest_without_file(teacher: Teacher, say: Callable[[str], None]) -> str:
    """Sha256 over all tensors of weights that are in no file: those of a seed, of a function, or of a hub now."""
    model = teacher.model
    if is_random(teacher.weights):
        say(f"untrained weights of {model}, seed {random_seed(str(teacher.weights))}")
        return untrained_digest(teacher)
    if is_recorded(model):
        digest = untrained_digest(teacher)
        if digest != untrained_digest(teacher):
            raise UserError(
                f"teacher {teacher.name}: two calls of its function returned different weights, although torch was "
                "seeded the same way",
                hint=f"Give a file of weights: {setting('weights', 'F')}; or let the function load them, or draw them "
                "by torch's own generator.",
            )
        say(f"weights of {teacher.name} as its function builds them")
        return digest
    if "num_classes" in teacher.arguments:
        raise UserError(
            "timm would give the hub's weights a new, random head",
            setting=setting("teacher_arg", "num_classes"),
            hint=f"Give a file of a network that was trained for these classes: {setting('weights', 'F')}",
        )
    hub = "" if ":" in model else " from torchvision" if model.startswith(TORCHVISION) else " from timm's hub"
    say(f"weights of {model}{hub}")
    return digest_of_state(_create(model, teacher.arguments, pretrained=True).state_dict())


def sized(model: str, input_size: int | None) -> dict[str, Any]:
    """The image size as an argument, where a function outside timm takes it."""
    from precompute.taps import takes_image_size

    return {"img_size": input_size} if input_size and outside_timm(model) and takes_image_size(model) else {}


def require_outside(model: str, prefix: Sequence[str] | None, tap_modules: Sequence[str]) -> None:
    """That what is said of networks outside timm makes sense, and of no other."""
    for name, values in {"prefix": prefix, "tap_module": tap_modules or None}.items():
        if values is not None and not outside_timm(model):
            why = f"only for your own or torchvision's networks; for {model} it is known"
            raise UserError(why, setting=setting(name, ",".join(values) or "none"))
    if unknown := [role for role in prefix or () if role not in ROLES]:
        message = f"no token has the role {unknown[0]!r}; expected {', '.join(ROLES)}, or none"
        raise UserError(message, setting=setting("prefix", ",".join(prefix or ())))


def require_said(name: str, **said: object) -> None:
    """That the input of a network outside timm is known. Raises UserError with what is to be given."""
    if missing := [
        setting(part, {"input_size": "N"}.get(part, part[0].upper())) for part, value in said.items() if not value
    ]:
        raise UserError(
            f"{name}: its input size, mean or std is unknown: its pretrained_cfg does not have all of them",
            hint=f"Give {' '.join(missing)}",
        )


def _find_ready(
    path: str, input_size: int | None, mean: Sequence[float] | None, std: Sequence[float] | None, teacher_name: str
) -> Teacher:
    """The teacher in a ready graph; a file says nothing of its mean and std, and its input's size only where fixed."""
    side = read_graph(path).side
    if mean is None or std is None:
        raise UserError(
            f"{path}: a graph does not say how its images are normalized",
            hint=f"Give {setting('mean', 'M')} and {setting('std', 'S')}, for pixels from 0 to 1 (usual are 0.5 "
            "and 0.5, or 0.485,0.456,0.406 and 0.229,0.224,0.225).",
        )
    if side is None and input_size is None:
        hint = f"Give the size that it was made for: {setting('input_size', 'N')}"
        raise UserError(f"{path}: it takes images of any size", hint=hint)
    if None not in (side, input_size) and side != input_size:
        message = f"{path} takes only images of {side}x{side}"
        raise UserError(message, setting=setting("input_size", input_size))
    size = side or input_size or 0
    _require_size(size)
    return Teacher(
        name=teacher_name,
        model=ONNX_FILE,
        arguments={},
        weights=path,
        digest=WeightsFile(path).digest,
        input_size=size,
        mean=_three(mean, "mean"),
        std=_three(std, "std"),
    )


def _checked_name(name: str, teacher_name: str | None) -> str:
    """What the store calls a teacher: as was said, or after its name."""
    if is_own(name):
        name = re.split(r"[/\\.]", name.rpartition(":")[0].removesuffix(".py"))[-1]
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1] if ":" in name else name  # of hf-hub:USER/NAME
    teacher_name = teacher_name or re.sub(r"[^A-Za-z0-9_-]", "_", last)[:40]
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", teacher_name):
        message = "a teacher's name has 1 to 40 letters, digits, - and _"
        raise UserError(message, setting=setting("teacher_name", teacher_name))
    if teacher_name == "views":
        message = "this name is taken by the stored view images; choose another"
        raise UserError(message, setting=setting("teacher_name", teacher_name))
    return teacher_name


def _require_size(input_size: int | None) -> None:
    if input_size is not None and not 8 <= input_size <= 4096:
        raise UserError("expected 8 to 4096", setting=setting("input_size", input_size))


def _three(values: Sequence[float], name: str) -> tuple[float, float, float]:
    numbers = tuple(float(v) for v in values) * (3 if len(values) == 1 else 1)
    if len(numbers) != 3 or not all(map(math.isfinite, numbers)) or (name == "std" and min(numbers) <= 0):
        raise UserError(
            f"expected one number or three, separated by commas{' (above 0)' * (name == 'std')}",
            setting=setting(name, ",".join(map(str, values))),
        )
    return numbers


def resolve(name: str) -> tuple[str, int | None]:
    """timm's name and the input size that goes with a short name; another name as it is, a folder's path absolute.

    Of a function of one's own what is recorded of it; its file is run.
    """
    source, _, folder = name.partition(":")
    if source == "local-dir" and folder:  # recorded in the store, so from anywhere
        return f"{source}:{Path(folder).expanduser().absolute()}", None
    if is_own(name):
        from precompute.taps import allow_network

        return allow_network(name).label, None
    return SHORT_NAMES.get(name, (name, None))


class WeightsConfig(NamedTuple):
    """The input that weights were trained for."""

    size: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]


def about_weights(model: str, name: str, arguments: Mapping[str, Any] | None = None) -> WeightsConfig:
    """What timm records of the weights of a name. Raises UserError where timm has no such name.

    Of a network outside timm what it says itself, made of these arguments; nothing where it says nothing.
    """
    import timm

    from precompute.taps import config_of_own, create_timm_model, torchvision_config
    from precompute.taps.timm_import import config_of, is_elsewhere

    config: Mapping[str, Any] | None
    if model.startswith(TORCHVISION):
        config = torchvision_config(model, f"teacher {name}")
    elif outside_timm(model):
        config = config_of_own(create_timm_model(model, arguments or {}, owner=f"teacher {name}"))
    elif is_elsewhere(model) or timm.is_model(model):
        try:
            config = config_of(model)
        except RuntimeError:  # the tag behind the dot
            known = timm.list_pretrained(f"{model.partition('.')[0]}.*")
            raise UserError(f"no weights are called {name!r}", hint=did_you_mean(name, known)) from None
        config = {"mean": (0.5,), "std": (0.5,)} if config is None else config
    else:
        close = difflib.get_close_matches(name, [*SHORT_NAMES, *timm.list_models()], cutoff=0.5)
        raise UserError(
            f"no teacher is called {name!r}",
            hint=f"{did_you_mean(name, close or SHORT_NAMES)} {call('teachers')} lists short names; every name of "
            "timm.list_models() can be used, too, and hf-hub:USER/NAME of timm's models on the Hugging Face Hub.",
        )
    size = config.get("input_size")
    return WeightsConfig(size[-1] if size else None, tuple(config.get("mean") or ()), tuple(config.get("std") or ()))


def untrained_digest(teacher: Teacher) -> str:
    """Sha256 over all tensors that the seed of an untrained teacher, or its function, gives now."""
    return digest_of_state(_network(teacher).state_dict())


def load_teacher(teacher: Teacher) -> nn.Module:
    """The network with its weights, f32, in eval mode.

    Raises:
        UserError: arguments that the model does not take, weights that do not fit it or are not weights.
    """
    from precompute.taps import adapt

    model, owner = _network(teacher), f"teacher {teacher.name}"
    if outside_timm(teacher.model):
        adapt(model, size=teacher.input_size, owner=owner, prefix=teacher.prefix, tap_modules=teacher.tap_modules)
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if isinstance(patch, tuple) and any(teacher.input_size % side for side in patch):
        nearest = patch[0] * max(1, round(teacher.input_size / patch[0]))
        raise UserError(
            f"{owner}: an input of {teacher.input_size} pixels is not a multiple of its patches of {patch[0]}",
            hint=f"Give {setting('input_size', nearest)}",
        )
    if is_random(teacher.weights) or (is_recorded(teacher.model) and teacher.weights is None):
        taken.require_same(teacher.weights, digest_of_state(model.state_dict()), teacher.digest, owner)
    elif teacher.weights is not None:
        try:
            load_weights(model, WeightsFile(teacher.weights), teacher.weights_key, EARLIER)
        except UserError as error:
            raise UserError(f"{owner}: {error}") from None
    return model.eval().float().requires_grad_(False)


def _network(teacher: Teacher) -> nn.Module:
    """The network of a teacher, with untrained weights or those of timm's hub; a file's are still to be loaded."""
    from precompute.taps import takes_image_size, untrained

    arguments = dict(teacher.arguments)
    if takes_image_size(teacher.model):
        arguments.setdefault("img_size", teacher.input_size)
    built = is_recorded(teacher.model) and teacher.weights is None
    if is_random(teacher.weights) or built:
        create = functools.partial(_create, teacher.model, arguments, pretrained=False)
        return untrained(create, "random:0" if built else str(teacher.weights))
    return _create(teacher.model, arguments, pretrained=teacher.weights is None)


def _create(model: str, arguments: dict[str, Any], *, pretrained: bool) -> nn.Module:
    from precompute.taps import create_timm_model

    hint = f"Change {setting('teacher_arg', 'NAME=VALUE')}, or leave it out."
    if pretrained:
        hint = f"Give a file: {setting('weights', 'F')}, or in a project file teachers.NAME.weights."
    return create_timm_model(model, arguments, owner=f"teacher {model}", hint=hint, pretrained=pretrained)


def anatomy(model: nn.Module, size: int) -> Anatomy:
    """What a network is made of: a `cnn`, a `vit` or an `other`.

    Args:
        model: any network.
        size: side of its input.
    """
    from precompute.taps import attention_layers, cnn_stages, stage_maps

    parts = Anatomy(
        parameters=sum(p.numel() for p in model.parameters()),
        network="other",
        layers=0,
        stages=len(stage_maps(model, size)),
    )
    with contextlib.suppress(UserError):
        return parts.model_copy(update={"network": "cnn", "layers": len(cnn_stages(model))})
    with contextlib.suppress(UserError):
        attention = attention_layers(model, size)
        heads = attention.layers[0].heads
        more = {"network": "vit", "layers": len(attention.layers), "heads": heads, "prefix": attention.prefix}
        return parts.model_copy(update=more)
    return parts
