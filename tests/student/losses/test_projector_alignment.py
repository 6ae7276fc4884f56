"""Projector alignment: the projector's sizes, the readings of Eq. 5, what gets a gradient, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.nn import functional as F

from storage.errors import UserError
from student.alignment.student_spec import StudentSpec
from student.losses.compress import CompRessConfig, CompRessLoss
from student.losses.parts.projector import projector
from student.losses.projector_alignment import ProjectorAlignmentConfig, ProjectorAlignmentLoss, mean_distance
from tests.manifests import stored
from tests.typed import grad, present

if TYPE_CHECKING:
    from student.targets.stored_target import StoredTarget

F64 = torch.float64
STUDENT = StudentSpec(2, 3, 4, ("class", "distillation"), width=6)


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def token(width: int) -> StoredTarget:
    return stored("class_token", [width])


def tokens(
    width: int, side: int = 4, layers: list[int] | None = None, prefix: tuple[str, ...] = ("class",)
) -> StoredTarget:
    shape = [len(layers or [1]), len(prefix) + side * side, width]
    return stored("tokens", shape, layers, {"prefix": prefix})


def loss(
    settings: ProjectorAlignmentConfig,
    given: StoredTarget,
    mine: torch.Tensor,
    target: torch.Tensor,
    student: StudentSpec = STUDENT,
) -> Any:
    made = ProjectorAlignmentLoss("it", settings, student, [given]).double()
    return made(SimpleNamespace(student_taps=SimpleNamespace(tokens=mine, embedding=mine[:, 0]), targets=(target,)))


# ---------------------------------------------------------------------------------------------- the projector


def maps_of(width: int, target: int, **settings: Any) -> list[nn.Module]:
    return list(projector(width, target, ProjectorAlignmentConfig(**settings)).children())


def test_the_projector_has_the_widths_of_the_authors_code():
    made = maps_of(192, 384)
    *parts, last = made
    assert sum(p.numel() for part in parts for p in part.parameters()) == 370_368
    assert isinstance(last, nn.LayerNorm)
    assert [m.out_features for m in made if isinstance(m, nn.Linear)] == [384, 192, 384, 384]
    assert sum(isinstance(m, nn.GELU) for m in made) == 3
    assert not any(isinstance(m, nn.GELU) for m in maps_of(192, 384, projector="linear"))


@pytest.mark.parametrize(("depth", "widths"), [(1, [9]), (2, [12, 9]), (8, [12, 6, 12, 6, 12, 6, 12, 9])])
def test_other_depths_alternate_likewise(depth, widths):
    assert [m.out_features for m in maps_of(6, 9, depth=depth) if isinstance(m, nn.Linear)] == widths


def test_depth_zero_is_the_identity_for_one_width_alone():
    same = values(2, 18, 6)
    assert loss(ProjectorAlignmentConfig(depth=0), token(6), same, same[:, 0]) == 0
    with pytest.raises(UserError, match=r"student's embedding is 6 wide, target t-class_token 9\n.*depth=4"):
        ProjectorAlignmentLoss("it", ProjectorAlignmentConfig(depth=0), STUDENT, [token(9)])
    CompRessLoss("it", CompRessConfig(depth=0, queues=2, queue=4), STUDENT, [token(9)])  # each side has its own queue
    with pytest.raises(UserError, match="depth=4"):
        CompRessLoss("it", CompRessConfig(depth=0, queue=4), STUDENT, [token(9)])


# ---------------------------------------------------------------------------------------------- the readings


def test_readings_of_the_distance():
    mine, theirs = values(5, 7), values(5, 7, seed=1)
    for reading in ("mse", "l2", "sq", "cosine"):
        assert mean_distance(theirs, theirs, reading).abs() < 1e-12
    assert torch.isclose(mean_distance(mine, theirs, "mse") * 7, mean_distance(mine, theirs, "sq"))
    assert torch.isclose(mean_distance(mine, theirs, "l2"), (mine - theirs).norm(dim=1).mean())
    assert torch.isclose(mean_distance(3 * mine, theirs, "cosine"), mean_distance(mine, theirs, "cosine"))
    units = F.normalize(mine, dim=1), F.normalize(theirs, dim=1)
    assert torch.isclose(mean_distance(*units, "sq"), mean_distance(mine, theirs, "cosine"))


@pytest.mark.parametrize("reading", ["mse", "l2", "sq", "cosine"])
def test_input_gradients_reach_the_class_token_alone(reading):
    mine, target = values(2, 18, 6).requires_grad_(), values(2, 9, seed=1)
    made = ProjectorAlignmentLoss(
        "it", ProjectorAlignmentConfig(distance=reading, depth=2), STUDENT, [token(9)]
    ).double()

    def run(x: torch.Tensor) -> Any:
        return made(SimpleNamespace(student_taps=SimpleNamespace(tokens=x, embedding=x[:, 0]), targets=(target,)))

    assert gradcheck(run, mine)
    run(mine).backward()
    assert (grad(mine)[:, 1:] == 0).all()
    assert (grad(mine)[:, 0] != 0).any()
    assert all(p.grad is not None for p in made.parameters())


# ---------------------------------------------------------------------------------------------- patches


def test_patch_tokens_meet_by_their_place():
    """The student has a distillation token between; its patches are the teacher's, its class token is not."""
    target = values(2, 1, 17, 6)
    mine = torch.cat([values(2, 2, 6, seed=1), target[:, 0, 1:]], 1)
    assert loss(ProjectorAlignmentConfig(depth=0, tokens="patches"), tokens(6), mine, target).abs() < 1e-12
    both = loss(ProjectorAlignmentConfig(depth=0, tokens="both"), tokens(6), mine, target)
    assert torch.isclose(both, F.mse_loss(mine[:, 0], target[:, 0, 0]))
    mine.requires_grad_()
    loss(ProjectorAlignmentConfig(tokens="patches"), tokens(9), mine, values(2, 1, 17, 9)).backward()
    assert (grad(mine)[:, :2] == 0).all()


def test_patches_of_another_grid_are_resized_on_request():
    target, mine = values(2, 1, 65, 6), values(2, 18, 6, seed=1)
    with pytest.raises(UserError, match=r"losses\.it\.grid=bicubic"):
        loss(ProjectorAlignmentConfig(depth=0, tokens="patches"), tokens(6, side=8), mine, target)
    images = target[:, 0, 1:].transpose(1, 2).reshape(2, 6, 8, 8)
    resized = F.interpolate(images, (4, 4), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    found = loss(ProjectorAlignmentConfig(depth=0, tokens="patches", grid="bicubic"), tokens(6, side=8), mine, target)
    assert torch.isclose(found, F.mse_loss(mine[:, 2:], resized))


@pytest.mark.parametrize(
    ("settings", "given", "student", "said"),
    [
        ({"tokens": "both"}, tokens(6, layers=[12]), STUDENT, "holds the residual stream, before the final norm"),
        ({"tokens": "both"}, tokens(6, prefix=()), STUDENT, "the teacher has no class token\n.*tokens=patches"),
    ],
)
def test_what_cannot_meet_is_refused(settings, given, student, said):
    with pytest.raises(UserError, match=said):
        ProjectorAlignmentLoss("it", ProjectorAlignmentConfig(**settings), student, [given])


def test_the_table_says_what_meets():
    row = present(ProjectorAlignmentLoss("it", ProjectorAlignmentConfig(), STUDENT, [token(9)]).row)
    assert (row.teacher, row.student) == ("class_token, 9 wide", "class token, 6 wide")
    assert row.rule == "projected by 4 mlp layer(s)"
    pooled = StudentSpec(0, 0, 0, (), width=6, pooled=6)
    row = present(ProjectorAlignmentLoss("it", ProjectorAlignmentConfig(), pooled, [token(9)]).row)
    assert row.student == "pooled features, 6 wide"
    patches = ProjectorAlignmentLoss(
        "it", ProjectorAlignmentConfig(tokens="patches", projector="linear"), STUDENT, [tokens(9)]
    ).row
    assert present(patches).rule.endswith("projected by 4 linear layer(s)")
