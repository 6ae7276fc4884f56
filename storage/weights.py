"""Files of weights: state dicts in safetensors or `.pth`, by their digest, and loaded strictly. No torch at import."""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.errors import UserError, first_line, shown
from storage.files import written_whole

if TYPE_CHECKING:
    from torch import Tensor, nn

READY = "onnx"  # what a teacher's identity has for its model where its file is a ready graph


def digest_of_file(path: str) -> str:
    """Sha256 of a file of weights, in hex. Raises UserError."""
    try:
        with Path(path).expanduser().open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"--weights {shown(Path(path))}: cannot be read: {first_line(error)}") from None


def digest_of_state(state: Mapping[str, Tensor]) -> str:
    """Sha256 over names, shapes and bytes of all tensors, in hex: what identifies weights that are no file of ours."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def classes_in(path: str) -> tuple[str, ...] | None:
    """The class names that a safetensors file of ours carries."""
    found = _note(path, "classes")
    good = isinstance(found, list) and all(isinstance(name, str) for name in found)
    return tuple(found) if good and found else None


def normalisation_in(path: str) -> dict[str, tuple[float, float, float]]:
    """`mean` and `std` of the pixels, three numbers each, as far as a safetensors file of ours carries them."""
    found = {name: _note(path, name) for name in ("mean", "std")}
    return {
        name: (float(value[0]), float(value[1]), float(value[2]))
        for name, value in found.items()
        if isinstance(value, list) and len(value) == 3 and all(isinstance(v, int | float) for v in value)
    }


def copies_attention(path: str) -> bool:
    """Whether a file of ours holds a student that attends with its teacher's attention: alone it is not whole."""
    return _note(path, "copying") is not None


def _note(path: str, name: str) -> Any:
    """What a safetensors file's metadata say of a name, as JSON; None where it says nothing."""
    if not path.endswith(".safetensors"):
        return None
    try:
        with Path(path).expanduser().open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, 100 << 20)))
        return json.loads(header.get("__metadata__", {}).get(name, "null"))
    except (OSError, ValueError, struct.error, AttributeError, TypeError, RecursionError):
        return None


def load_weights(model: nn.Module, path: str) -> None:
    """Load a safetensors or `.pth` file, strictly; position embeddings of another grid are resampled as timm does.

    Raises:
        UserError: not weights, a pickle that holds more than tensors, names or shapes that do not fit; a student that
            attends with another network's attention.
    """
    if copies_attention(path):
        raise UserError(
            f"{path}: a student that copies its teacher's attention is not whole without it; give one that attends "
            "by itself"
        )
    state = fitted(model, read_weights(path), path)
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in state.items()}
    if problems := misfits(wanted, found):
        raise UserError(
            f"{shown(Path(path))}: does not fit {_name_of(model)}: {problems}\n"
            "  Give this network's own weights, or the arguments that theirs was made with: "
            f"--teacher-arg {_other_classes(model, wanted, found) or 'NAME=VALUE'}"
        )
    model.load_state_dict(state, strict=True)


def fitted(model: nn.Module, state: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """A state dict as this timm model wants it: names of older files, position embeddings of another grid resampled.

    Raises:
        UserError: timm cannot bring them into shape.
    """
    resample = getattr(sys.modules.get(type(model).__module__), "checkpoint_filter_fn", None)
    if resample and "pos_embed" in state:
        try:
            state = dict(resample(state, model))
        except Exception as error:  # timm reshapes what is there, whatever it is
            raise UserError(f"{where}: does not fit {_name_of(model)}: {first_line(error)}") from None
    for name, counter in model.state_dict().items():
        if name.endswith(".num_batches_tracked"):  # a counter that older files lack and evaluation does not read
            state.setdefault(name, counter)
    return state


def _name_of(model: nn.Module) -> str:
    """What timm calls a network."""
    about = getattr(model, "default_cfg", None) or {}
    return str(about.get("architecture") or type(model).__name__)


def _other_classes(model: nn.Module, wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> str:
    """The argument that is missing where the number of classes alone differs, else nothing."""
    head = f"{(getattr(model, 'default_cfg', None) or {}).get('classifier')}."
    odd = {name for name in {**wanted, **found} if wanted.get(name) != found.get(name)}
    classes = found.get(f"{head}weight", ())[:1]
    return f"num_classes={classes[0]}" if classes and all(name.startswith(head) for name in odd) else ""


def misfits(wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> str:
    """What keeps the tensors found from being those wanted, with a few names; empty where nothing does."""
    shapes = [
        f"{name} has shape {found[name]}, expected {shape}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    parts = [*shapes[:2], *([f"{len(shapes) - 2} more of other shapes"] if len(shapes) > 2 else [])]
    for names, what in (
        ([n for n in wanted if n not in found], "missing"),
        ([n for n in found if n not in wanted], "unexpected"),
    ):
        if names:
            parts.append(f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})")
    return "; ".join(parts)


def read_weights(path: str) -> dict[str, Tensor]:
    """Name -> tensor f32 of a safetensors file, or of a `.pth` read with `weights_only=True`. Raises UserError."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    where = shown(Path(path))
    try:
        state: Any
        if path.endswith(".safetensors"):
            state = load_file(Path(path).expanduser())
        else:
            with Path(path).expanduser().open("rb") as file:
                if file.read(2) not in (b"PK", *(b"\x80" + bytes([protocol]) for protocol in range(1, 6))):
                    raise UserError(
                        f"{where}: not a file of weights: neither safetensors nor what torch.save writes; give one"
                    )
            state = torch.load(Path(path).expanduser(), map_location="cpu", weights_only=True)
            for wrapper in ("model", "state_dict"):
                if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
                    state = state[wrapper]
    except UserError:
        raise
    except (SafetensorError, OSError, EOFError, RuntimeError) as error:
        raise UserError(f"{where}: cannot be read as weights: {first_line(error)}") from None
    except Exception as error:  # the unpickler names what it refuses
        raise UserError(
            f"{where}: refused: it is a pickle with more than tensors in it ({first_line(error)[:200]}); "
            "save the state dict as safetensors"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"{where}: expected a state dict of tensors")
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
    with written_whole(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.write(memoryview(data)[8 + length :])
