"""Where a student starts from, and what of it is not trained: weights by name patterns, a new head, frozen parts."""

from __future__ import annotations

import difflib
import json
import shlex
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from precompute.taps import config_of, create_timm_model
from storage.errors import UserError, setting
from storage.objects.rename import mismatches, rename_to_fit, shapes
from storage.objects.state_dict import as_f32
from student.models.attention_copy_hooks import COPIED
from student.models.outside_timm import names_outside_timm, recorded_config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor, nn

    from storage.objects.weights_file import WeightsFile
    from student.settings import StudentConfig


def begin_from(
    model: nn.Module,
    settings: StudentConfig,
    file: WeightsFile | None,
    classes: Sequence[str] | None,
    say: Callable[[str], None],
) -> None:
    """Give a new student the weights that its settings name, if any, and say which were taken and which are new.

    Position embeddings of another grid are resampled as timm does. A head of other classes stays new; of a student
    without a classifier it is skipped.

    Args:
        model: the student, with fresh weights.
        settings: `pretrained`, `weights_key` and `init`.
        file: of `weights`.
        classes: the names of the run's classes, where they are known.
        say: called with a line.

    Raises:
        UserError: weights that could not be read or do not fit, a pattern that matches nothing.
    """
    if file is None and not settings.pretrained:
        return
    where = file.path if file else f"timm's weights of {settings.model}"
    state: Mapping[str, Tensor]
    if file:
        chosen = file.weights(settings.weights_key)
        state = as_f32(chosen.state)
        where += f", {chosen}" if chosen.others else ""
    else:
        hint = f"Give a file: {setting('student.pretrained', 'false')} {setting('student.weights', 'F')}"
        state = create_timm_model(settings.model, {}, owner="student", hint=hint, pretrained=True).state_dict()
    state = {name: tensor for name, tensor in state.items() if not name.startswith(COPIED)}
    known = file.classes if file else None
    if settings.shifted_patches:  # timm would bring a convolution's weights into the shape of the one that is not there
        state.pop("patch_embed.proj.weight", None)
    state = rename_to_fit(model, state, where, say)
    own = model.state_dict()
    names = matching(settings.init, own, "student.init")
    other_classes = bool(known and classes and tuple(classes) != known)
    heads = {name for name in own if name.rpartition(".")[0] in _classifiers(model)}  # of both heads
    new_heads = [
        name
        for name in names
        if name in heads and (other_classes or name not in state or len(state[name]) != len(own[name]))
    ]
    norms = [name for name in names if name not in state and _twin(name) in state and _twin(name) not in own]
    new = [*new_heads, *norms]
    expected = {name: own[name] for name in names if name not in new}
    taken = {name: tensor for name, tensor in state.items() if name in expected}
    unused: list[str] = []
    if settings.init == ("*",):  # then nothing is skipped silently
        unused = [name for name in state if name not in own and name.rpartition(".")[0] in _classifiers(model)]
        skipped = {*unused, *(_twin(name) for name in norms)}
        taken |= {name: tensor for name, tensor in state.items() if name not in own and name not in skipped}
    if problems := mismatches(shapes(expected), shapes(taken)):
        raise UserError(f"{where}: does not fit {settings.model}: {problems}", hint=_hint(own, state))
    model.load_state_dict({**own, **{name: taken[name] for name in expected}})
    text = f"begins from {where}: {len(expected)} of {len(own)} tensors"
    if new:
        reasons = {"a head of other classes": new_heads, "the final norm of another pooling": norms}
        text += f"; new are {', '.join(new)} ({' and '.join(reason for reason, names in reasons.items() if names)})"
    if unused:
        text += f"; left out is its classifier ({', '.join(sorted(unused))})"
    if file and file.copies_attention:
        text += "; it copied its teacher's attention, so what it would attend with by itself was never trained"
    say(text)


def normalization(
    settings: StudentConfig, file: WeightsFile | None, network: nn.Module | None = None
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of the pixels that a student is fed with, three channels each.

    One that timm does not have, `network`, says itself what it wants.
    """
    about: Mapping[str, Any] = {}
    if network is not None and names_outside_timm(settings.model):
        about = recorded_config(settings, network)
    elif settings.pretrained or file:
        about = config_of(settings.model) or {}
    recorded = {**about, **(file.normalization if file else {})}
    mean, std = (tuple(recorded.get(name) or (0.5, 0.5, 0.5)) for name in ("mean", "std"))
    return settings.mean or mean, settings.std or std


def channels_text(values: Sequence[float]) -> str:
    """A number for each channel, or one where they are equal."""
    return ", ".join(f"{value:g}" for value in (values[:1] if len(set(values)) == 1 else values))


def freeze(model: nn.Module, patterns: Sequence[str], say: Callable[[str], None]) -> list[nn.Module]:
    """Take parameters out of the training; their number is said.

    Returns:
        Modules with frozen running statistics, which are to stay in eval mode.

    Raises:
        UserError: a pattern that matches nothing, or nothing left to train.
    """
    if not patterns:
        return []
    frozen = set(matching(patterns, model.state_dict(), "student.freeze"))
    parameters = dict(model.named_parameters())
    for name in frozen & set(parameters):
        parameters[name].requires_grad_(False)
    count = sum(p.numel() for p in parameters.values() if not p.requires_grad)
    total = sum(p.numel() for p in parameters.values())
    if not any(p.requires_grad for p in parameters.values()):
        raise UserError(f"student.freeze: {', '.join(patterns)} freezes the whole student; nothing is left to train")
    say(f"frozen: {count:,} of {total:,} parameters ({len(frozen & set(parameters))} tensors)")
    return [
        module
        for name, module in model.named_modules()
        if any(f"{name}.{buffer}" in frozen for buffer, _ in module.named_buffers(recurse=False))
    ]


def matching(patterns: Iterable[str], names: Iterable[str], where: str) -> list[str]:
    """The names that some shell pattern matches, in their order.

    Raises:
        UserError: a pattern that matches none, with the nearest names.
    """
    names = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, 3, 0.0)
            raise UserError(f"{where}: {pattern!r} matches no parameter of the student; near: {', '.join(near)}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    """The names of the classifier's modules, whether the network has it or not."""
    about = getattr(model, "pretrained_cfg", None) or {}
    heads = about.get("classifier") or "head"
    return (heads,) if isinstance(heads, str) else tuple(heads)


def _twin(name: str) -> str:
    """The final norm's tensor under the other pooling: timm's `norm` before the tokens, `fc_norm` after their mean."""
    return {"norm": "fc_norm", "fc_norm": "norm"}.get(name.rpartition(".")[0], "") + "." + name.rpartition(".")[2]


def _hint(own: dict[str, Tensor], state: dict[str, Tensor]) -> str:
    """How to take the parts that fit."""
    parts: dict[str, bool] = {}
    for name, tensor in own.items():
        part = name.partition(".")[0] + ".*" * ("." in name)
        parts[part] = parts.get(part, True) and name in state and state[name].shape == tensor.shape
    if not (good := [part for part, fits in parts.items() if fits]):
        return "Are these weights of this model?"
    return f"Take what fits, the rest stays new: {setting('student.init', shlex.quote(json.dumps(good)))}"
