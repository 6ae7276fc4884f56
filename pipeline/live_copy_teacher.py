"""What a student that copies attention needs when it is asked: its teacher, run over the very images."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from precompute.engine.session import open_session
from storage.errors import UserError
from storage.store.store import Store
from student.attention_copy.inference import copier_of
from student.models.attention_copy_hooks import attention_copy_hooks

if TYPE_CHECKING:
    from student.models.files import StudentDescription

LiveCopyTeacher = Callable[[np.ndarray], AbstractContextManager[None]]


def live_copy_teacher(model: nn.Module, about: StudentDescription, store: str | None) -> LiveCopyTeacher:
    """What holds while a student looks at images `[n, S, S, 3]`: the attention that it copies, by the stored graphs.

    Args:
        model: the student, on its device.
        about: its description.
        store: where its teacher's graphs are; None: where they were when it was trained.

    Raises:
        UserError: no store, a control that has no attention of these images.
    """
    hooks, record = attention_copy_hooks(model), about.attention_copy
    if hooks is None or hooks.fixed or record is None:
        return lambda _images: nullcontext()
    if record.permute is not None:
        raise UserError("this student is a control: it copies the attention of other images of a block, not of these")
    opened = Store.open(store or record.store)
    copier, targets = copier_of(model, record, opened)
    device, made_by = next(model.parameters()).device, [stored.target.graph_output for stored in targets]
    teacher = targets[0].teacher.id
    sessions = {graph: open_session(opened.graph(teacher, graph)) for graph in {graph for graph, _ in made_by}}

    def holds(images: np.ndarray) -> AbstractContextManager[None]:
        outputs = {graph: session.run(images) for graph, session in sessions.items()}
        values = [torch.from_numpy(outputs[graph][position]) for graph, position in made_by]
        return hooks.attending(copier.to(device).copied([value.to(device) for value in values]))

    return holds
