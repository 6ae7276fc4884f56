"""Parts of a teacher's architecture that a student lacks, where attention is transferred.

"Attention Transfer Is Not Universally Effective for Vision Transformers" (arXiv 2605.07191): of eleven families of
teachers four leave a plain student up to 5.1 points below no transfer at all. It recovers once it has the teacher's
native components, untrained. Architectures are compared by what the networks are made of, not by their names.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import timm
import torch
from timm.layers import GluMlp, SwiGLU
from torch import nn

from precompute.taps import (
    ATTENTION,
    FACTORY_ARGUMENTS,
    attention_layers,
    constructor_arguments,
    create_timm_model,
    image_size,
    takes_image_size,
)
from storage.errors import UserError, setting

if TYPE_CHECKING:
    from collections.abc import Iterable

    from storage.store.manifests import TeacherIdentity
    from student.targets.stored_target import Targets

# part -> the arguments of timm's constructors that add it; one of them at most is a network's
_ADDED_BY = {
    "a class token": ("class_token",),
    "register tokens": ("reg_tokens", "num_reg_tokens"),
    "LayerScale": ("init_values",),
    "qk-norm": ("qk_norm",),
    "a norm before its layers": ("pre_norm", "use_pre_transformer_norm"),
    "rotary positions": ("use_rot_pos_emb",),
    "relative positions": ("use_rel_pos_bias",),
    "SwiGLU": ("swiglu_mlp",),
}


def parts_of(network: nn.Module) -> dict[str, str]:
    """The parts that a network has, by its modules, parameters and attention, and the arguments' value that adds them.

    On the meta device this takes no time.

    Raises:
        UserError: its attention cannot be read.
    """
    attending = attention_layers(network, image_size(network), pooled=True)
    modules = {n.rpartition(".")[2]: m for n, m in network.named_modules() if not isinstance(m, nn.Identity)}
    registers = attending.prefix.count("register")
    scale = re.compile(r"(.*\.)?(ls\d?\.gamma|gamma_?\d)")
    has = {
        "a class token": "class" in attending.prefix,
        "register tokens": registers > 0,
        "LayerScale": any(scale.fullmatch(name) for name, _ in network.named_parameters()),
        "qk-norm": "q_norm" in modules,
        "a norm before its layers": "norm_pre" in modules,
        "rotary positions": any(name.startswith("rope") for name in modules),
        "relative positions": any(layer.biased for layer in attending.layers),
        "SwiGLU": any(isinstance(module, GluMlp | SwiGLU) for module in network.modules()),
    }
    values = {"register tokens": str(registers), "LayerScale": "1e-5"}
    return {part: values.get(part, "true") for part, it_has in has.items() if it_has}


def missing_parts(student: nn.Module, teacher: TeacherIdentity, name: str) -> str | None:
    """A warning that says what the student lacks, and the settings that add it.

    None where nothing is missing, and of a teacher whose architecture is not known here: a ready graph, or a network
    outside timm.

    Args:
        student: its network.
        teacher: what names the teacher's network.
        name: what the store calls the teacher.
    """
    if not timm.is_model(teacher.model):
        return None
    arguments = {n: value for n, value in teacher.arguments.items() if n not in FACTORY_ARGUMENTS}
    if takes_image_size(teacher.model):
        arguments.setdefault("img_size", teacher.input_size)
    try:
        with torch.device("meta"):
            network = create_timm_model(teacher.model, arguments, owner=f"teacher {name}")
        own, needed = parts_of(student), parts_of(network)
    except UserError:  # it says more where it is to be made or read
        return None
    known, words = constructor_arguments(student), list[str]()
    for part in [part for part in needed if part not in own]:
        settings = [setting(f"student.args.{n}", needed[part]) for n in _ADDED_BY[part] if n in known]
        words.append(f"{part} ({', '.join(settings) or 'this network has no setting for it'})")
    if not words:
        return None
    return (
        f"warning: the student lacks parts of teacher {name}: {', '.join(words)}. Without them, attention transfer can "
        f"make a student worse than training without a teacher (arXiv 2605.07191). To take all of them: "
        f"{setting('student.like', name)}"
    )


def missing_parts_of_teachers(student: nn.Module, losses: Iterable[Targets]) -> list[str]:
    """A warning for each teacher whose stored attention is transferred and whose parts the student lacks.

    Args:
        student: its network.
        losses: the stored targets of each.
    """
    stored = [target for targets in losses for target in targets if target.target.identity.tap in ATTENTION]
    teachers = {target.teacher.id: target.teacher.identity for target in stored}
    warnings = [missing_parts(student, identity, name) for name, identity in teachers.items()]
    return [warning for warning in warnings if warning]
