"""Names of networks that are not timm's: functions of a user's file or module, and torchvision's. No torch."""

from __future__ import annotations

import re

TORCHVISION = "torchvision/"  # opens the names of its networks
BUILT = "as built"  # what a store has for weights that a function gives its network
OWN = re.compile(r"(?P<source>[^#]+\.py|[A-Za-z_]\w*(?:\.\w+)*):(?P<function>[A-Za-z_]\w*)")
LABEL = re.compile(r"(?P<source>.+):(?P<key>[A-Za-z_]\w*#[0-9a-f]{16})")


def is_own(name: str) -> bool:
    """Whether a name is of a function: `FILE.py:FUNCTION` or `MODULE:FUNCTION`."""
    return bool((match := OWN.fullmatch(name)) and match["source"] not in ("hf_hub", "random"))


def is_recorded(model: str) -> bool:
    """Whether this is what stores and runs call a network of one's own: with a digest of the file's text."""
    return LABEL.fullmatch(model) is not None


def outside_timm(model: str) -> bool:
    """Whether a recorded name is of a network of one's own, or of torchvision."""
    return is_recorded(model) or model.startswith(TORCHVISION)


def key_of(model: str) -> str:
    """Function and digest of a recorded name; of a name that a user gives, the function, wherever its file lies.

    Another name stays as it is.
    """
    match = LABEL.fullmatch(model)
    if match:
        return match["key"]
    return OWN.fullmatch(model)["function"] if is_own(model) else model  # type: ignore[index]


def bare(model: str) -> str:
    """A recorded name without its digest, as the user says it."""
    return model.partition("#")[0] if is_recorded(model) else model


def runs_nothing(model: str) -> str:
    """A name that a store or a run records. Raises ValueError for a function as a user names it, whose code would run.

    What is recorded of a function has a digest, and is looked for only among those that the user names.
    """
    if is_own(model):
        raise ValueError(f"{model}: expected a network's name, found a function without the digest of its file")
    return model
