"""Names of tensors in files, as trainings and other codes write them, brought to those of a timm network."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

from storage.errors import UserError, first_few, first_line
from storage.objects.checkpoint_file import several_fit
from storage.objects.transformers_names import from_transformers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor, nn

    Shapes = Mapping[str, tuple[int, ...]]
    State = Mapping[str, Tensor]

# What timm's modules call their conversion of other codes' files.
_CONVERSIONS = ("checkpoint_filter_fn", "_filter_fn", "_filter_torchvision_pretrained")
_MOST_TRIED = 8  # prefixes behind which timm's conversion is tried

COUNTER = ".num_batches_tracked"  # ends the names of what older files lack and evaluation does not read


def rename_to_fit(
    model: nn.Module, state: State, where: str, say: Callable[[str], None] = lambda _line: None
) -> dict[str, Tensor]:
    """A state dict as this timm model wants it.

    Names lose the prefixes of wrappers (DDP, torch.compile). Names of other codes become timm's, and position
    embeddings of another grid are resampled, by the model's own `checkpoint_filter_fn`, where the rest does not fit.
    Where most of the network's names are still not there, they are looked for behind a prefix, and among the names of
    Hugging Face transformers; other tensors are then left out. So is a projection head in the classifier's place.

    Args:
        model: a timm network; its parameters may be on the meta device.
        state: name -> tensor.
        where: the file, for messages.
        say: called with a line on what was stripped, renamed and left out.

    Raises:
        UserError: timm cannot bring them into shape, or several prefixes fit equally well.
    """
    from timm.models import clean_state_dict

    own = model.state_dict()
    counters = {name: tensor for name, tensor in own.items() if name.endswith(COUNTER)}
    cleaned: dict[str, Tensor] = clean_state_dict(dict(state))
    problem = None
    try:
        renamed = _converted(model, cleaned, where)
    except UserError as error:
        problem, renamed = error, cleaned
    if not _has_most(renamed, own):
        prefix = _prefix(own, cleaned, where)
        if prefix:
            renamed = _converted(model, behind(prefix, cleaned), where)
            say(f"{where}: {_stripped(prefix, cleaned)}")
        elif library := from_transformers(model, cleaned, where):
            renamed = _converted(model, library.state, where)
            say(f"{where}: the names of transformers' {library.family} became timm's{_left_out(library.left_out)}")
        elif behind_prefix := _converted_behind_prefix(model, cleaned, where):
            prefix, renamed = behind_prefix
            say(f"{where}: {_stripped(prefix, cleaned)}")
        elif problem:
            raise problem
    if heads := projections(model, renamed):
        renamed = {name: tensor for name, tensor in renamed.items() if name not in heads}
        count = f"{len(heads)} tensor{'s' * (len(heads) > 1)} ({first_few(heads, 3)})"
        say(f"{where}: a projection head in the classifier's place was left out: {count}")
    return {**counters, **renamed}


def behind(prefix: str, state: State) -> dict[str, Tensor]:
    """What has names with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _stripped(prefix: str, state: State) -> str:
    others = [name for name in state if not name.startswith(prefix)]
    return f"the prefix {prefix!r} was stripped from {len(state) - len(others)} names{_left_out(others)}"


def _left_out(names: list[str]) -> str:
    count = f"{len(names)} other {'tensor was' if len(names) == 1 else 'tensors were'}"
    return f"; {count} left out ({first_few(names, 3)})" if names else ""


def _has_most(state: State, own: State) -> bool:
    return 2 * sum(name in state for name in own) > len(own)


def _prefix(own: State, state: State, where: str) -> str:
    """What stands before most of a network's names in a file; empty where there is no such prefix.

    Raises:
        UserError: two prefixes fit equally well, by names and shapes.
    """
    scores: dict[str, list[int]] = {}
    for name, tensor in state.items():
        for prefix in ("", *_heads(name)):
            if (inner := own.get(name.removeprefix(prefix))) is not None:
                score = scores.setdefault(prefix, [0, 0])
                score[0] += 1
                score[1] += inner.shape == tensor.shape
    return _best({prefix: (n, fit) for prefix, (n, fit) in scores.items() if 2 * n > len(own)}, where)


def _heads(name: str) -> Iterator[str]:
    """What stands before each dot of a name, with the dot."""
    return (name[: dot.end()] for dot in re.finditer(r"\.", name))


def _best(scores: Mapping[str, tuple[int, ...]], where: str) -> str:
    best = [prefix for prefix, score in scores.items() if score == max(scores.values())]
    if len(best) > 1 and "" not in best:
        raise several_fit(best, where)
    return best[0] if len(best) == 1 else ""


def _converted(model: nn.Module, state: State, where: str) -> dict[str, Tensor]:
    """A state dict after timm's own conversion, where it does not fit without. Raises UserError where that fails."""
    own = shapes(model.state_dict())
    counters = {name: shape for name, shape in own.items() if name.endswith(COUNTER)}
    convert = _conversion(model)
    if convert is None or not mismatches(own, {**counters, **shapes(state)}):
        return dict(state)
    try:
        return dict(convert(dict(state)))
    except Exception as error:  # timm reshapes what is there, whatever it is
        raise UserError(
            f"{where}: does not fit {name_of(model)}: {mismatches(own, shapes(state))}; timm's "
            f"conversion of it ends in {type(error).__name__}: {first_line(error)}"
        ) from None


def _converted_behind_prefix(model: nn.Module, state: State, where: str) -> tuple[str, dict[str, Tensor]] | None:
    """A prefix behind which timm's conversion finds most of the network's names, and what it makes of them."""
    own = model.state_dict()
    counts = Counter(prefix for name in state for prefix in _heads(name))
    converted: dict[str, dict[str, Tensor]] = {}
    for prefix, count in counts.most_common(_MOST_TRIED):
        with contextlib.suppress(UserError):
            if 2 * count > len(own) and _has_most(part := _converted(model, behind(prefix, state), where), own):
                converted[prefix] = part
    best = _best({prefix: (sum(name in part for name in own),) for prefix, part in converted.items()}, where)
    return (best, converted[best]) if best else None


def _conversion(model: nn.Module) -> Callable[[dict[str, Tensor]], dict[str, Tensor]] | None:
    """timm's conversion of other codes' files to a network's names, as the network's own module has it."""
    module = sys.modules.get(type(model).__module__)
    convert = next((getattr(module, name) for name in _CONVERSIONS if hasattr(module, name)), None)
    if convert is None:
        return None
    parameters = inspect.signature(convert).parameters
    options: dict[str, Any] = {"model": model} if "model" in parameters else {}
    if "adapt_layer_scale" in parameters:  # DeiT-III's names, which no other file has
        options["adapt_layer_scale"] = True
    if "interpolation" in parameters and re.search("flexi|radio", name_of(model)):  # as timm says for these
        options |= {"interpolation": "bilinear", "antialias": False}
    return functools.partial(convert, **options)


def name_of(model: nn.Module) -> str:
    """What timm calls a network."""
    about = getattr(model, "default_cfg", None) or {}
    return str(about.get("architecture") or type(model).__name__)


def classifiers(model: nn.Module) -> tuple[str, ...]:
    """What the names of a network's classifiers begin with, whether it has them or not: `("head.",)`."""
    about = getattr(model, "default_cfg", None) or {}
    heads = about.get("classifier") or ()
    return tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))


def projections(model: nn.Module, state: State) -> list[str]:
    """Names in the classifier's place that no classifier has, such as `head.mlp.0.weight`."""
    own, heads = model.state_dict(), classifiers(model)
    return [
        name
        for name in state
        if name not in own and any(name.startswith(head) and "." in name.removeprefix(head) for head in heads)
    ]


def shapes(state: State) -> dict[str, tuple[int, ...]]:
    """The shapes of a state dict's tensors."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def mismatches(expected: Shapes, actual: Shapes) -> str:
    """How some tensors differ from those that are expected, with a few names; empty where they do not."""
    other = [f"{n} has shape {actual[n]}, expected {s}" for n, s in expected.items() if actual.get(n, s) != s]
    parts = [*other[:2], *([f"{len(other) - 2} more of other shapes"] if len(other) > 2 else [])]
    for what, one, two in (("missing", expected, actual), ("unexpected", actual, expected)):
        if names := [name for name in one if name not in two]:
            parts.append(f"{len(names)} {what} ({first_few(names, 3)})")
    return "; ".join(parts)
