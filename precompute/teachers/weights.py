"""What a teacher takes by `weights`: which of a file's, whether they have a classifier, untrained ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from storage.errors import UserError, setting

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

    from storage.objects.checkpoint_file import Choice
    from storage.objects.weights_file import WeightsFile


def choose(file: WeightsFile, wanted: str | None, say: Callable[[str], None]) -> tuple[str | None, Choice | None]:
    """The weights that are taken of a file, said where there are others; their key is None for those by `EARLIER`.

    They are None where the file is nothing but weights, and not read.

    Raises:
        UserError: no file of weights, or no weights under this key.
    """
    if file.path.endswith(".safetensors") and wanted is None:
        return None, None
    chosen = file.weights(wanted)
    if chosen.others and wanted is None:
        which = "" if chosen.key in ("teacher", "student") else ", as timm chooses"
        say(f"weights of {file.path}: {chosen}{which}; choose others by {setting('weights_key', 'KEY')}")
    return None if chosen.as_earlier else chosen.key, chosen


def fitting_arguments(
    create: Callable[[], nn.Module],
    arguments: Mapping[str, Any],
    file: WeightsFile,
    chosen: Choice | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The arguments of a network that takes a file's weights: `num_classes=0` is added where these have no classifier.

    What is stripped from the file's names, renamed and left out is said. What does not fit is left for
    `load_teacher` to refuse.

    Args:
        create: makes the network of the arguments, without weights.
        arguments: of `timm.create_model`.
        file: of the weights.
        chosen: which of them, as `choose` gives it.
        say: called with lines.
    """
    import torch

    from storage.objects.rename import classifiers, mismatches, rename_to_fit, shapes
    from storage.objects.state_dict import as_f32

    try:
        with torch.device("meta"):
            network = create()
        state = rename_to_fit(network, as_f32((chosen or file.weights()).state), file.name, say)
    except UserError:
        return dict(arguments)
    heads, own = classifiers(network), network.state_dict()
    body = {name: shape for name, shape in shapes(own).items() if not (heads and name.startswith(heads))}
    if "num_classes" in arguments or len(body) == len(own) or mismatches(body, shapes(state)):
        return dict(arguments)
    say(f"{file.name}: it has no classifier, so the network is made without one (num_classes=0)")
    return {**arguments, "num_classes": 0}


def require_same(weights: str | None, digest: str, expected: str, owner: str) -> None:
    """Refuse weights that are in no file and differ from those that were recorded. Raises UserError.

    Args:
        weights: `random:SEED`; None for those that a function gives its network.
        digest: sha256 of the tensors now.
        expected: the recorded one.
        owner: opens the message.
    """
    if digest == expected:
        return
    source, reason = "its function", ""
    hint = f"Give a file of weights: {setting('weights', 'F')}"
    if weights is not None:
        source, reason = weights, ": this version of timm or torch initializes networks differently"
        hint = "Use the versions that the targets were made with, or precompute again under another "
        hint += f"{setting('teacher_name', 'NAME')}."
    message = f"{owner}: {source} gives other weights than those that were recorded (sha256 of the tensors "
    raise UserError(f"{message}{expected[:16]}, now {digest[:16]}){reason}", hint=hint)
