"""Rules for activation maps and class logits."""

from __future__ import annotations

from storage.errors import IdentityError, UserError
from storage.unicode_names import all_normalized
from student.alignment.report import AlignmentRow
from student.alignment.student_spec import StudentSpec
from student.settings import WITH_CLASS
from student.targets.stored_target import StoredTarget

# ---------------------------------------------------------------------------------------------- maps and classes


def align_activations(loss: str, given: StoredTarget, student: StudentSpec, wanted: int, links: str) -> AlignmentRow:
    """AAL: every class-row map of the student may be linked to every activation map of the teacher.

    Args:
        loss: its name.
        given: a target of activations.
        student: its shape.
        wanted: side of the grid that the student's maps are brought to, where it is not theirs.
        links: which are trained, in words.

    Raises:
        UserError: the target has another grid (stored maps are never resampled), or no class token.
    """
    manifest, identity = given.target, given.target.identity
    channels, grid = manifest.sample_shape[0], identity.grid
    if grid != wanted:
        raise UserError(
            f"{loss}: target {manifest.id} has a grid of {grid}x{grid}, the student's patches make "
            f"{wanted}x{wanted}; stored maps are never resampled: precompute with grid={wanted}"
        )
    if "class" not in student.prefix:
        raise UserError(
            f"{loss}: the student has no class token, so no class rows to link; take one that has, such as "
            f"--set student.model={WITH_CLASS}"
        )
    stages = " + ".join(str(stage.channels) for stage in manifest.stages)
    dropped = ", ".join(student.prefix)
    how = ", after the residual sum" * (identity.at == "block") + ", antialiased" * bool(identity.antialias)
    kinds = dict.fromkeys(student.by_layer)
    counts = " + ".join(f"{student.by_layer.count(kind)} layers x {kind[0]} heads" for kind in kinds)
    sides = " and ".join(f"{side}x{side}" for _, side in kinds)
    rows = f"{counts} = {student.maps} class rows of {sides}"
    rows += f", brought to {grid}x{grid} (bicubic)" * any(side != grid for _, side in kinds)
    return AlignmentRow(
        loss, manifest.id, f"{channels} maps ({stages}) of {grid}x{grid}{how}", rows,
        f"{links}; keys left out: {dropped}",
    )  # fmt: skip


def align_classes(loss: str, given: StoredTarget, student: StudentSpec, same_classes: bool) -> AlignmentRow:
    """Contract 10: logits meet only a student of the same classes in the same order.

    Raises:
        IdentityError: another number of classes, or other names.
        UserError: a list of names is not known and nobody said that they are the same.
    """
    count, names = given.target.sample_shape[0], given.teacher.classes
    where = f"{loss}: target {given.id}"
    words = ("the student has", "the teacher")
    do = "Logits teach only a student of the same classes, in one order. A teacher of these: pipeline fit-teacher"
    if count != student.classes:
        raise IdentityError(where, "number of classes", student.classes, count, do, words)
    if names and student.names:
        own, theirs = all_normalized(student.names), all_normalized(names)
        if len(theirs) != len(own):
            raise IdentityError(where, "names of classes", len(own), len(theirs), do, words)
        if theirs != own:
            at = next(i for i, (a, b) in enumerate(zip(own, theirs, strict=True)) if a != b)
            raise IdentityError(where, f"class {at}", own[at], theirs[at], do, words)
        said = "the same names"
    elif not same_classes:
        unknown = "the teacher's classes are" if not names else "the student's classes are (no classes.json)"
        raise UserError(
            f"{where}: {unknown} not known by name, so nobody can tell whether class 3 is class 3; if you know that "
            "both lists are the same, in the same order, say --same-classes"
        )
    else:
        said = "taken as the same (--same-classes)"
    return AlignmentRow(loss, given.id, f"{count} logits of {given.teacher.id}", f"{student.classes} classes", said)
