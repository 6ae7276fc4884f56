"""A student's file: a timm state dict in safetensors, with what is needed to build it again."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import AfterValidator, ConfigDict, Field, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from precompute.taps import adapt
from storage.errors import UserError, call, first_line
from storage.objects.atomic import atomic_write
from storage.objects.network_names import outside_timm, runs_nothing
from storage.objects.record_schema import Schema, Several, Three, checked
from storage.unicode_names import all_normalized
from storage.views.policy import Policy, policy
from student.models.attention_copy_hooks import COPIED, AttentionCopyHooks, AttentionCopyRecord, attention_copy_hooks
from student.models.build import create
from student.models.outside_timm import create_outside_timm
from student.models.shifted_patch import shift_patches
from student.run_dir import NETWORK
from student.settings import ATTENTION_COPY
from student.upgrade import upgraded

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

_AS_JSON = ("arguments", "img_size", "mean", "std", "classes")  # fields of a description


class StudentDescription(Schema):
    """What rebuilds a student, and how to feed and read it.

    Attributes:
        model: name of the network for `timm.create_model`.
        arguments: of `timm.create_model`.
        img_size: side of the square input.
        mean: of the input, per channel.
        std: of the input, per channel.
        classes: names of the classes, None where they are not known.
        evaluation: line of the view policy that it is evaluated on.
        shifted_patches: whether patches are made by `student.models.shifted_patch` in place of timm's convolution.
        attention_copy: what is copied from where, of a student that copies attention.
    """

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, AfterValidator(runs_nothing)]
    arguments: dict[str, Any]
    img_size: Annotated[int, Field(ge=1, le=4096)]
    mean: Three
    std: Three
    classes: Several[str] | None
    evaluation: str
    shifted_patches: bool = False
    attention_copy: AttentionCopyRecord | None = None

    @model_validator(mode="after")
    def _evaluation(self) -> Self:
        try:
            policy(self.evaluation, self.img_size)
        except UserError as error:
            raise ValueError(f"evaluation: expected a view policy, found {error.message}") from None
        return self

    @property
    def evaluation_policy(self) -> Policy:
        """The view policy that it is evaluated on, at its input size."""
        return policy(self.evaluation, self.img_size)

    @property
    def classifies(self) -> bool:
        """Whether it has a classifier; one that was trained without labels gives features."""
        return self.arguments.get("num_classes") != 0

    @property
    def plain_timm(self) -> bool:
        """Whether `timm.create_model` alone builds it."""
        return not self.shifted_patches and self.attention_copy is None and not outside_timm(self.model)


def save_student(path: Path, model: nn.Module, description: StudentDescription) -> None:
    """Write a student's state dict with its description; the file is replaced whole or not at all.

    Args:
        path: of the safetensors file.
        model: the student.
        description: what `load_student` needs to rebuild it.

    Raises:
        OSError: the file cannot be written.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if hooks := attention_copy_hooks(model):
        state |= {f"{COPIED}{part}": tensor.detach().cpu().contiguous() for part, tensor in hooks.fixed.items()}
    fields = description.model_dump(exclude_defaults=True, exclude={"attention_copy"})
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
    metadata = {"format": "pt", **texts}
    if description.attention_copy:
        metadata["copying"] = json.dumps(description.attention_copy.plain())
    with atomic_write(path) as temporary:
        save_file(state, temporary, metadata)


def load_student(path: Path) -> tuple[nn.Module, StudentDescription]:
    """A student that `save_student` wrote, in eval mode.

    Args:
        path: of the safetensors file, such as `run/last.safetensors`.

    Raises:
        UserError: no such file, or not a student's.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        fields = {name: json.loads(metadata[name]) for name in _AS_JSON}
        fields |= {name: metadata[name] for name in ("model", "evaluation")}
        fields["shifted_patches"] = metadata.get("shifted_patches") == "true"
        fields["attention_copy"] = _attention_copy(json.loads(metadata.get("copying", "null")))
        recorded = checked(StudentDescription, fields, str(path), f"Give a student that {call('train')} wrote.")
        classes = tuple(all_normalized(recorded.classes or ())) or None
        description = recorded.model_copy(update={"classes": classes})
    except FileNotFoundError:
        raise UserError(f"{path}: no student here", hint=f"{call('train')} writes one.") from None
    except KeyError as error:
        raise UserError(
            f"{path}: not a student that {call('train')} wrote: its metadata do not tell {first_line(error)}"
        ) from None
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not a student that {call('train')} wrote ({first_line(error)})") from None
    if not outside_timm(description.model):
        model = create(description.model, description.arguments)
    else:
        copy = path.with_name(NETWORK)
        kept = str(copy) if copy.is_file() else ""
        model = create_outside_timm(description.model, description.arguments, str(path), kept)
        adapt(model, size=description.img_size, owner=f"student {description.model}")
    if description.shifted_patches:
        shift_patches(model)
    fixed = {name.removeprefix(COPIED): state.pop(name) for name in [*state] if name.startswith(COPIED)}
    try:
        model.load_state_dict(state)
        if copied := description.attention_copy:
            hooks = AttentionCopyHooks(copied.settings.tensors, copied.layers, copied.heads)
            hooks.fixed = fixed
            hooks.attach(model)
    except (RuntimeError, IndexError) as error:
        raise UserError(f"{path}: does not fit {description.model}: {first_line(error)}") from None
    return model.eval(), description


def _attention_copy(record: Any) -> Any:
    """What a header says of attention copy, with settings under today's names."""
    if not isinstance(record, dict) or "settings" not in record:
        return record
    return {**record, "settings": upgraded(record["settings"], ATTENTION_COPY)}


def load_classifier(path: Path) -> tuple[nn.Module, StudentDescription]:
    """A student with a classifier, from its file; arguments and errors as `load_student`.

    Raises:
        UserError: also where it has no classifier.
    """
    model, about = load_student(path)
    if not about.classifies:
        student = {"student.model": about.model, "student.pretrained": "false", "student.weights": path}
        raise UserError(
            f"{path}: this student was trained without labels and has no classifier",
            hint=f"Measure its features: {call('evaluate', 'knn', 'RUN')}, or linear-probe.\n"
            f"  Train a classifier on labels: {call('train', '…', recipe='fine-tune', **student)}",
        )
    return model, about
