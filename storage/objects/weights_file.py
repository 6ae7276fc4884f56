"""Files of weights (safetensors, or what torch.save writes): digest, metadata, tensors. No torch at import."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.errors import UserError, display_path, first_line, setting
from storage.objects.checkpoint_file import ORDER, Choice, archive_of_another_kind, choose, plain_data, refused_in
from storage.unicode_names import all_normalized

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def is_random(weights: str | None) -> bool:
    """Whether weights are no file but the untrained ones of a seed: `random:SEED`."""
    return (weights or "").startswith("random:")


def random_seed(weights: str) -> int:
    """The seed in `random:SEED`. Raises UserError where it is no whole number."""
    text = weights.partition(":")[2]
    if not re.fullmatch(r"\d{1,18}", text, re.ASCII):
        message = "expected a whole number after random:, the seed of untrained weights"
        raise UserError(message, setting=setting("weights", weights), hint=f"Give {setting('weights', 'random:0')}")
    return int(text)


class WeightsFile:
    """A file of weights. Its digest and its metadata are read at their first use, and kept.

    Args:
        path: of the file; `~` is the home folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.name = display_path(Path(path))  # as messages call it
        self._file = Path(path).expanduser()
        self._is_safetensors = self.path.endswith(".safetensors")

    @functools.cached_property
    def digest(self) -> str:
        """Sha256 of the file, in hex. Raises UserError where it cannot be read."""
        try:
            with self._file.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"cannot be read: {first_line(error)}", setting=setting("weights", self.name)) from None

    @functools.cached_property
    def metadata(self) -> Mapping[str, str]:
        """The texts in the header of a safetensors file; none of another file, or of one that cannot be read."""
        from safetensors import SafetensorError, safe_open

        with contextlib.suppress(SafetensorError, OSError, ValueError):
            if self._is_safetensors:
                with safe_open(self._file, "np") as file:  # it refuses headers that are too long, or are none
                    return file.metadata() or {}
        return {}

    def note(self, name: str) -> Any:
        """An entry of the metadata that is JSON; None where there is none."""
        try:
            return json.loads(self.metadata.get(name, "null"))
        except (ValueError, RecursionError):
            return None

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The class names that a file of ours carries, in NFC."""
        names = self.note("classes")
        is_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
        return tuple(all_normalized(names)) if is_names and names else None

    @property
    def normalization(self) -> dict[str, tuple[float, float, float]]:
        """`mean` and `std` of the pixels, three numbers each, as far as a file of ours carries them."""
        values = {name: self.note(name) for name in ("mean", "std")}
        return {
            name: (float(value[0]), float(value[1]), float(value[2]))
            for name, value in values.items()
            if isinstance(value, list) and len(value) == 3 and all(isinstance(v, int | float) for v in value)
        }

    @property
    def copies_attention(self) -> bool:
        """Whether it holds a student that attends with its teacher's attention: alone it is not whole."""
        return self.note("copying") is not None

    def weights(self, key: str | None = None, order: Sequence[str] = ORDER) -> Choice:
        """The weights that are taken of it. Its tensors, which are large, are read each time and not kept.

        Args:
            key: of one of several dictionaries in a `.pth`; None for the first of `order`.
            order: keys of dictionaries; by default timm's, which prefers averaged weights (EMA).

        Raises:
            UserError: no file of weights, a pickle that holds more than plain data, no dictionary of tensors.
        """
        return choose(self._content(), self.name, key, order)

    def _content(self) -> Any:
        import torch
        from safetensors import SafetensorError, safe_open

        try:
            if self._is_safetensors:
                with safe_open(self._file, "pt") as opened:
                    self.metadata = opened.metadata() or {}
                    return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            with self._file.open("rb") as file:
                start = file.read(2)
            if start not in (b"PK", *(b"\x80" + bytes([protocol]) for protocol in range(1, 6))):
                raise UserError(f"{self.name}: not a file of weights: neither safetensors nor written by torch.save")
            if other := archive_of_another_kind(self._file):
                raise UserError(f"{self.name}: not a file of weights: it is {other[0]}", hint=other[1])
            with plain_data(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return torch.load(self._file, map_location="cpu", weights_only=True)
        except UserError:
            raise
        except (SafetensorError, OSError, EOFError, RuntimeError) as error:
            raise UserError(f"{self.name}: cannot be read as weights: {first_line(error)}") from None
        except Exception as error:  # the unpickler names what it refuses
            if refused := refused_in(self._file, error):
                message = f"refused: it is a pickle with more than tensors in it, which could run code: {refused}"
                hint = "If you trust it, save its state dict alone, as safetensors: safetensors.torch.save_file"
                raise UserError(f"{self.name}: {message}", hint=hint) from None
            message = "cannot be read as weights: it is damaged, or not a pickle of torch.save"
            raise UserError(f"{self.name}: {message}") from None
