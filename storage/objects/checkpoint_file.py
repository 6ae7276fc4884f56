"""What a file of weights holds: which of its dictionaries is taken, and what it is where it has no weights to take.

A training's checkpoint holds several things: weights, their average (EMA), an optimizer's state, arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import re
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from storage.errors import UserError, first_few, setting

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

# Keys of a checkpoint under which weights lie, the first one first: the order of timm.models.load_state_dict, and then
# what self-distillation (DINO, iBOT) writes.
ORDER = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher", "student")
# The order of earlier versions, which teachers are recorded by that name no key.
EARLIER = ("model", "state_dict")
DEEPEST = 4  # levels of dictionaries that are looked through
SHOWN = 6  # entries of a dictionary that messages name


@dataclass(frozen=True)
class Choice:
    """The weights that are taken of a file.

    Attributes:
        key: their key, with dots between levels; empty where the file is nothing but weights.
        state: name -> tensor.
        others: keys of other dictionaries of tensors in the file.
        as_earlier: whether earlier versions would have taken the same.
    """

    key: str
    state: Mapping[str, Tensor]
    others: tuple[str, ...]
    as_earlier: bool

    def __str__(self) -> str:
        also = f" (it also has {', '.join(map(_word, self.others[:SHOWN]))})" if self.others else ""
        return f"{_word(self.key)}{also}"


def choose(content: Any, where: str, key: str | None = None, order: Sequence[str] = ORDER) -> Choice:
    """The weights of a file's content, by their key or as timm chooses.

    Args:
        content: what the file holds.
        where: the file, for errors.
        key: of the weights, with dots between levels; None for the first of `order` at each level. Of names with dots
            it may also be the first parts: then only what has them is taken, without them.
        order: keys to look for.

    Raises:
        UserError: there is no dictionary of tensors, or none under this key; what the file holds is listed.
    """
    chosen, state = _first(content, order) if key is None else (key, _at(content, key))
    if key is not None and state is None:  # the first parts of names in the dictionary that is taken without a key
        first, inner = _first(content, ORDER)
        chosen, state = ".".join(filter(None, [first, key])), _part(inner, key)
    known = _states(content)
    if not _is_state(state):
        problem = "expected a state dict of tensors" if key is None else "there is no state dict of tensors at this key"
        hint = f"Choose one of its dictionaries of tensors: {setting('weights_key', _word(known[0]))}" if known else ""
        at_setting = "" if key is None else setting("weights_key", key)
        raise UserError(f"{where}: {problem}; it holds {contents(content)}", setting=at_setting, hint=hint)
    others = tuple(name for name in known if name != chosen and not chosen.startswith(f"{name}."))
    return Choice(chosen, state, others, _first(content, EARLIER)[0] == chosen)


def _first(content: Any, order: Sequence[str]) -> tuple[str, Any]:
    """The first dictionary at each level, down to one of tensors, and its key."""
    path: list[str] = []
    while isinstance(content, dict) and not _is_state(content) and len(path) < DEEPEST:
        name = next((name for name in order if isinstance(content.get(name), dict)), None)
        if name is None:
            break
        path.append(name)
        content = content[name]
    return ".".join(path), content


def _at(content: Any, key: str) -> Any:
    """What lies under a key with dots between levels; keys may have dots themselves."""
    if not isinstance(content, dict):
        return None
    if key in content:
        return content[key]
    heads = [key[: dot.start()] for dot in re.finditer(r"\.", key)]
    below = next((_at(content[head], key[len(head) + 1 :]) for head in heads if head in content), None)
    return _part(content, key) if below is None else below


def _part(content: Any, prefix: str) -> Mapping[str, Tensor] | None:
    """What of a dictionary of tensors has names with these first parts, without them; None where nothing has."""
    from timm.models import clean_state_dict

    prefix = f"{prefix.rstrip('.')}."
    for state in (content, clean_state_dict(content)) if _is_state(content) else ():
        if part := {n.removeprefix(prefix): tensor for n, tensor in state.items() if n.startswith(prefix)}:
            return part
    return None


def several_fit(prefixes: Sequence[str], where: str) -> UserError:
    """The error where parts of a file, by the prefixes of their names, fit a network equally well."""
    keys = [setting("weights_key", _word(prefix.rstrip("."))) for prefix in prefixes if prefix][:SHOWN]
    names = " and ".join(repr(_word(prefix)) for prefix in prefixes[:SHOWN])
    message = f"{where}: the network's names are there with the prefixes {names}, which fit equally well"
    return UserError(message, hint=f"Choose one: {' or '.join(keys)}")


def _is_state(content: Any) -> bool:
    """Whether something is a dictionary of tensors by their names."""
    import torch

    return (
        isinstance(content, dict)
        and len(content) > 0
        and all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items())
    )


def _states(content: Any, path: str = "", level: int = 0) -> list[str]:
    """Keys of all dictionaries of tensors below."""
    if not isinstance(content, dict) or level >= DEEPEST:
        return []
    entries = {f"{path}{name}": value for name, value in content.items() if isinstance(name, str)}
    states = ([key] if _is_state(value) else _states(value, f"{key}.", level + 1) for key, value in entries.items())
    return list(itertools.chain.from_iterable(states))


def contents(content: Any, level: int = 0) -> str:
    """What a file holds, in words: keys, kinds, and the first names of tensors."""
    import torch

    if isinstance(content, torch.Tensor):
        return f"a tensor of shape {list(content.shape)}"
    if not isinstance(content, dict):
        return type(content).__name__
    if not content:
        return "an empty dictionary"
    if _is_state(content):
        return f"{len(content)} tensors ({first_few([_word(name) for name in content], 3)})"
    if level >= DEEPEST:
        return "a dictionary"
    named = [f"{_word(name)}: {contents(value, level + 1)}" for name, value in list(content.items())[:SHOWN]]
    return f"a dictionary {{{'; '.join(named)}{'; …' * (len(content) > SHOWN)}}}"


def _word(name: Any) -> str:
    """A key as messages show it: without control characters, and not too long."""
    text = name if isinstance(name, str) and name.isprintable() else ascii(name)
    return text if len(text) <= 60 else f"{text[:59]}…"


def plain_data() -> contextlib.AbstractContextManager[None]:
    """Let `torch.load(weights_only=True)` take an argparse.Namespace too, as timm does: it is data and runs nothing."""
    import torch

    return torch.serialization.safe_globals([argparse.Namespace])


def archive_of_another_kind(path: Path) -> tuple[str, str] | None:
    """What a zip archive is that torch.save did not write, and how to get weights from it; None for other files."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return None
    if any(name.endswith("/constants.pkl") for name in names):
        return (
            "a TorchScript archive, code with weights",
            "If you trust it, save its weights alone: torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')",
        )
    if names and all(name.endswith(".npy") for name in names):
        return (
            "NumPy arrays, as JAX models are published",
            "If timm knows the model, save the weights under its names: "
            "torch.save(timm.create_model(NAME, checkpoint_path=FILE).state_dict(), 'weights.pth')",
        )
    if not any(name.endswith("data.pkl") for name in names):
        return "a zip archive that torch.save did not write", ""
    return None


def refused_in(path: Path, error: Exception) -> str | None:
    """What of a pickle could run code, by name, so that it was not read; None where that was not the reason."""
    import torch

    names: list[str] = []
    with contextlib.suppress(Exception), plain_data():  # it reads pickles of torch.save alone, and runs none
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    names = names or re.findall(r"GLOBAL (\S+) was not an allowed", str(error))
    if names:
        return first_few([_word(name) for name in names], SHOWN)
    return "code or objects" if "nsupported" in str(error) else None
