"""State dicts: loaded strictly into timm networks, identified, and written as safetensors. No torch at import."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import re
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from storage.errors import UserError, first_few, first_line, setting
from storage.objects.atomic import atomic_write
from storage.objects.checkpoint_file import ORDER

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from storage.objects.weights_file import WeightsFile


# What timm's modules call their conversion of other codes' files.
_CONVERSIONS = ("checkpoint_filter_fn", "_filter_fn", "_filter_torchvision_pretrained")

Shapes = Mapping[str, tuple[int, ...]]

COUNTER = ".num_batches_tracked"  # ends the names of what older files lack and evaluation does not read

HUB = "timm hub"  # what it has for its weights where timm downloaded them
ONNX_FILE = "onnx"  # what a teacher's identity has for its model where its file is a ready graph


def digest_of_state(state: Mapping[str, Tensor]) -> str:
    """Sha256 over names, shapes and bytes of all tensors, in hex: what identifies weights that are no file of ours."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_weights(model: nn.Module, file: WeightsFile, key: str | None = None, order: Sequence[str] = ORDER) -> None:
    """Load a file's weights, strictly; what another code wrote is converted as timm does.

    Args:
        model: a timm network.
        file: of the weights.
        key: of one of several dictionaries in it, as in `WeightsFile.weights`.
        order: of the keys that are looked for, as there.

    Raises:
        UserError: not weights, a pickle that holds more than tensors, names or shapes that do not fit; a student that
            attends with another network's attention.
    """
    chosen = file.weights(key, order)
    if file.copies_attention:
        message = f"{file.path}: a student that copies its teacher's attention is incomplete without the teacher"
        raise UserError(message, hint="Give a student that computes its own attention.")
    others = f"Its weights are {chosen}; choose others by {setting('weights_key', 'KEY')}" if chosen.others else ""
    try:
        state = rename_to_fit(model, as_f32(chosen.state), file.name)
    except UserError as error:
        raise UserError(error.message, hint=others) from None
    expected, actual = _shapes(model.state_dict()), _shapes(state)
    if problems := mismatches(expected, actual):
        hint = "\n  ".join(filter(None, [others, _hint(model, expected, actual)]))
        raise UserError(f"{file.name}: does not fit {_name_of(model)}: {problems}", hint=hint)
    model.load_state_dict(state, strict=True)


def rename_to_fit(model: nn.Module, state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """A state dict as this timm model wants it, by what timm does with files of other codes.

    Names lose the prefixes of wrappers (DDP, torch.compile). Names of other codes become timm's, and position
    embeddings of another grid are resampled, by the model's own `checkpoint_filter_fn`, where the rest does not fit.

    Raises:
        UserError: timm cannot bring them into shape.
    """
    from timm.models import clean_state_dict

    own = model.state_dict()
    counters = {name: t for name, t in own.items() if name.endswith(COUNTER)}
    renamed: dict[str, Tensor] = clean_state_dict(dict(state))
    convert = _conversion(model)
    if convert and mismatches(_shapes(own), _shapes({**counters, **renamed})):
        try:
            renamed = dict(convert(dict(renamed)))
        except Exception as error:  # timm reshapes what is there, whatever it is
            raise UserError(
                f"{where}: does not fit {_name_of(model)}: {mismatches(_shapes(own), _shapes(renamed))}; timm's "
                f"conversion of it ends in {type(error).__name__}: {first_line(error)}"
            ) from None
    return {**counters, **renamed}


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
    if "interpolation" in parameters and re.search("flexi|radio", _name_of(model)):  # as timm says for these
        options |= {"interpolation": "bilinear", "antialias": False}
    return functools.partial(convert, **options)


def _name_of(model: nn.Module) -> str:
    """What timm calls a network."""
    about = getattr(model, "default_cfg", None) or {}
    return str(about.get("architecture") or type(model).__name__)


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _hint(model: nn.Module, expected: Shapes, actual: Shapes) -> str:
    """What to do about a file that does not fit, by how its names and shapes differ from a network's."""
    head = f"{(getattr(model, 'default_cfg', None) or {}).get('classifier')}."
    odd = [name for name in {**expected, **actual} if expected.get(name) != actual.get(name)]
    if all(name.startswith(head) for name in odd):
        classes = actual.get(f"{head}weight", (0,))[0]
        fact = f"Its classifier has {classes} classes" if classes else "It has no classifier"
        return f"{fact}: {setting('teacher_arg', f'num_classes={classes}')}"
    if prefix := _prefix(expected, actual):
        return f"The network's names are there with the prefix {prefix!r}; save the state dict without it."
    names = [name for name in actual if not name.endswith(COUNTER)]
    if expected.keys().isdisjoint(names):
        library = " (they look like those of transformers' models)" if any("encoder.layer" in n for n in names) else ""
        return (
            f"None of its {len(names)} names is one of the network's{library}: give this network's own weights, with "
            "timm's names."
        )
    return (
        "Give this network's own weights, or the arguments that theirs was made with, such as depth or embed_dim: "
        f"{setting('teacher_arg', 'NAME=VALUE')}"
    )


def _prefix(expected: Shapes, actual: Shapes) -> str:
    """What stands before most of a network's names in a file; nothing where there is no such prefix."""
    name = next(iter(expected), "")
    prefixes = [other.removesuffix(name) for other in actual if name and other.endswith(f".{name}")]
    counts = {prefix: sum(f"{prefix}{one}" in actual for one in expected) for prefix in prefixes}
    best = max(counts, key=counts.__getitem__, default="")
    return best if 2 * counts.get(best, 0) > len(expected) else ""


def mismatches(expected: Shapes, actual: Shapes) -> str:
    """How some tensors differ from those that are expected, with a few names; empty where they do not."""
    shapes = [f"{n} has shape {actual[n]}, expected {s}" for n, s in expected.items() if actual.get(n, s) != s]
    parts = [*shapes[:2], *([f"{len(shapes) - 2} more of other shapes"] if len(shapes) > 2 else [])]
    for what, one, other in (("missing", expected, actual), ("unexpected", actual, expected)):
        if names := [name for name in one if name not in other]:
            parts.append(f"{len(names)} {what} ({first_few(names, 3)})")
    return "; ".join(parts)


def as_f32(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with all floating-point numbers in f32."""
    return {name: t.float() if t.is_floating_point() else t for name, t in state.items()}


def save_state(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a state dict as safetensors, whole or not at all; the same content gives the same bytes."""
    from safetensors.torch import save

    data = save({name: t.detach().cpu().contiguous() for name, t in state.items()}, dict(metadata))
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))  # in the library's order of the moment
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.write(memoryview(data)[8 + length :])
