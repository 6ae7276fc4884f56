"""State dicts: loaded strictly into timm networks, identified, and written as safetensors. No torch at import."""

from __future__ import annotations

import hashlib
import json
import struct
from typing import TYPE_CHECKING, Any

from storage.errors import UserError, setting
from storage.objects.atomic import atomic_write
from storage.objects.checkpoint_file import ORDER
from storage.objects.rename import COUNTER, classifiers, mismatches, name_of, rename_to_fit, shapes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from storage.objects.weights_file import WeightsFile


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
        raise UserError(error.message, hint="\n  ".join(filter(None, [others, error.hint]))) from None
    expected, actual = shapes(model.state_dict()), shapes(state)
    if problems := mismatches(expected, actual):
        hint = "\n  ".join(filter(None, [others, _hint(model, expected, actual)]))
        raise UserError(f"{file.name}: does not fit {name_of(model)}: {problems}", hint=hint)
    model.load_state_dict(state, strict=True)


def _hint(model: nn.Module, expected: Mapping[str, Any], actual: Mapping[str, Any]) -> str:
    """What to do about a file that does not fit, by how its names and shapes differ from a network's."""
    heads = classifiers(model)
    differing = [name for name in {**expected, **actual} if expected.get(name) != actual.get(name)]
    if heads and all(name.startswith(heads) for name in differing):
        classes = actual.get(f"{heads[0]}weight", (0,))[0]
        fact = f"Its classifier has {classes} classes" if classes else "It has no classifier"
        return f"{fact}: {setting('teacher_arg', f'num_classes={classes}')}"
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
