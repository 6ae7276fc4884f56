"""Features from inside the projector that a student was trained with: AttnDistill's ablation of where to evaluate.

Wang et al., Table 10 (d): features after 0 (the student's own) to all of the projector's linear maps. The projector
lies in `losses.safetensors` beside the student.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from precompute.taps import image_size
from storage.errors import UserError, first_line, setting
from storage.objects.weights_file import WeightsFile
from student.alignment.student_taps import class_index, embedding_width
from student.evaluation.frozen.features import Reading, class_feature, class_token
from student.losses.parts.projector import projector
from student.run_dir import LOSSES
from student.settings import ProjectorLossConfig

if TYPE_CHECKING:
    from pathlib import Path

_NAME = re.compile(r"(?P<loss>.+)\.projector\.(?P<name>[0-9]{1,3}\.(weight|bias))")


def projector_reading(student: Path, model: nn.Module, layers: int) -> tuple[Reading, str]:
    """What reads features inside a projector off a student's network, and what they are in words.

    It begins with what projectors are trained on: the class token after the final norm, whatever the classifier reads,
    or the pooled features of a network without one.

    Args:
        student: its file.
        model: itself, on its device.
        layers: linear maps of the projector, at least one.

    Raises:
        UserError: as `projector_layers`; a projector of another embedding.
    """
    module = projector_layers(student, layers).to(next(model.parameters()).device)
    first = module[0]
    assert isinstance(first, nn.LayerNorm)
    width, expected = embedding_width(model, image_size(model)), first.weight.numel()
    if width != expected:
        raise UserError(f"{student}: its embedding is {width} wide, the projector beside it takes {expected}")
    pooled = class_index(model) is None
    text = "pooled features" if pooled else "class token after the final norm"
    read = class_feature if pooled else class_token
    words = f"{text}, through {layers} of the projector's linear maps"
    return lambda network, pixels: module(read(network, pixels)), words


def projector_layers(student: Path, layers: int) -> nn.Sequential:
    """The first linear maps of the projector that lies beside a student, from `[…, D]`.

    Each but the last comes with the GELU that follows it, where there is one; the last with the final norm.

    Args:
        student: its file.
        layers: how many, at least one.

    Raises:
        UserError: no projector there, several, fewer maps, or a file that is not what `train` writes.
    """
    if student.name != "last.safetensors":
        message = "the projector that is kept is that of the last student; give the run, or its last one"
        raise UserError(f"{student}: {message}")
    path = student.with_name(LOSSES)
    state = WeightsFile(path).weights().state if path.is_file() else {}
    matches = [match for match in map(_NAME.fullmatch, state) if match]
    losses = {match["loss"] for match in matches}
    if not losses:
        where = setting("projector_layers", layers)
        raise UserError(f"{student} was trained without a projector", setting=where, hint="Leave the setting out.")
    if len(losses) > 1:
        raise UserError(f"{path}: has projectors of {', '.join(sorted(losses))}; features of one alone can be read")
    module = _module({match["name"]: state[match[0]] for match in matches}, str(path))
    ends = [n for n, part in enumerate(module, 1) if isinstance(part, nn.Linear)]
    if layers > len(ends):
        message = f"the projector of {student} has {len(ends)} linear map(s)"
        raise UserError(message, setting=setting("projector_layers", layers))
    return module if layers == len(ends) else nn.Sequential(*list(module)[: ends[layers] - 1])


def _module(state: dict[str, Tensor], where: str) -> nn.Sequential:
    """The projector with this state dict. Raises UserError: there is no such projector."""
    maps, last = sum(tensor.dim() == 2 for tensor in state.values()), max(int(name.partition(".")[0]) for name in state)
    try:
        ends = [len(state[f"{at}.weight"]) for at in (0, last)]
        config = ProjectorLossConfig(projector="mlp" if last > maps + 1 else "linear", depth=maps)
        with torch.device("meta"):  # a hostile file may say widths that no memory holds
            module = projector(ends[0], ends[1], config)
        module.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{where}: its projector is not one that `train` writes: {first_line(error)}") from None
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise UserError(f"{where}: its projector has values that are not finite")
    assert isinstance(module, nn.Sequential)  # maps are there: without any, nothing has names
    return module.requires_grad_(False).eval()
