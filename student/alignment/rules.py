"""Rules for activation maps and class logits."""

from __future__ import annotations

from storage.errors import IdentityError, UserError, call, setting
from storage.unicode_names import all_normalized
from student.alignment.report import AlignmentRow
from student.alignment.student_spec import StudentSpec
from student.settings import WITH_CLASS
from student.targets.stored_target import StoredTarget


def align_activations(loss: str, stored: StoredTarget, student: StudentSpec, grid: int, links: str) -> AlignmentRow:
    """AAL: every class-row map of the student may be linked to every activation map of the teacher.

    Args:
        loss: name of the loss.
        stored: a target of activations.
        student: the student's shape.
        grid: side of the grid that the student's maps are brought to.
        links: which links are trained, in words.

    Raises:
        UserError: the target has another grid (stored maps are never resampled), or no class token.
    """
    manifest, identity = stored.target, stored.target.identity
    channels, stored_grid = manifest.sample_shape[0], identity.grid
    if stored_grid != grid:
        raise UserError(
            f"{loss}: target {manifest.id} has a grid of {stored_grid}x{stored_grid}, the student's patches make "
            f"{grid}x{grid}; stored maps are never resampled: precompute with grid={grid}"
        )
    if "class" not in student.prefix:
        hint = f"Take one that has a class token, such as {setting('student.model', WITH_CLASS)}"
        raise UserError(f"{loss}: the student has no class token, so no class rows to link", hint=hint)
    stages = " + ".join(str(stage.channels) for stage in manifest.stages)
    read = ", after the residual sum" * (identity.at == "block") + ", antialiased" * bool(identity.antialias)
    kinds = dict.fromkeys(student.by_layer)
    counts = " + ".join(f"{student.by_layer.count(kind)} layers x {kind[0]} heads" for kind in kinds)
    sides = " and ".join(f"{side}x{side}" for _, side in kinds)
    rows = f"{counts} = {student.maps} class rows of {sides}"
    rows += f", brought to {grid}x{grid} (bicubic)" * any(side != grid for _, side in kinds)
    maps = f"{channels} maps ({stages}) of {grid}x{grid}{read}"
    return AlignmentRow(loss, manifest.id, maps, rows, f"{links}; keys left out: {', '.join(student.prefix)}")


def align_classes(loss: str, stored: StoredTarget, student: StudentSpec, same_classes: bool) -> AlignmentRow:
    """Contract 10: logits meet only a student of the same classes in the same order.

    Raises:
        IdentityError: another number of classes, or other names.
        UserError: a list of names is not known, and `same_classes` is not set.
    """
    count, names = stored.target.sample_shape[0], stored.teacher.classes
    where = f"{loss}: target {stored.id}"
    words = ("the student has", "the teacher")
    hint = (
        f"Logits teach only a student of the same classes, in one order. Make a teacher of these: {call('fit_teacher')}"
    )
    if count != student.classes:
        raise IdentityError(where, "number of classes", student.classes, count, hint, words)
    if names and student.names:
        student_names, teacher_names = all_normalized(student.names), all_normalized(names)
        if len(teacher_names) != len(student_names):
            raise IdentityError(where, "names of classes", len(student_names), len(teacher_names), hint, words)
        if teacher_names != student_names:
            n = next(n for n, pair in enumerate(zip(student_names, teacher_names, strict=True)) if pair[0] != pair[1])
            raise IdentityError(where, f"class {n}", student_names[n], teacher_names[n], hint, words)
        rule = "the same names"
    elif not same_classes:
        unknown = "the teacher's classes are" if not names else "the student's classes are (no classes.json)"
        raise UserError(
            f"{where}: {unknown} not known by name, so it is not known whether class 3 is the same class on both sides",
            hint=f"If you know that both lists are the same, in the same order, give {setting('same_classes', True)}",
        )
    else:
        rule = "taken as the same (same_classes)"
    teacher = f"{count} logits of {stored.teacher.id}"
    return AlignmentRow(loss, stored.id, teacher, f"{student.classes} classes", rule)
