"""What meets what: layers, heads, grids and tokens of teacher and student (PAPERS: matching rules, known answers)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import timm
import torch
from torch.nn import functional as F

from storage.errors import IdentityError, UserError
from student.alignment.attention import AttentionAligner, log_mean
from student.alignment.rules import align_classes
from student.alignment.student_spec import StudentSpec, student_spec
from student.losses import advit, attention_transfer, head_specific
from student.targets.stored_target import StoredTarget
from tests.manifests import stored
from tests.student.attention import attention_of, taps_of
from tests.typed import present

if TYPE_CHECKING:
    from student.settings import AlignedLossConfig

SETTINGS: dict[str, type[AlignedLossConfig]] = {
    "class": advit.ADViTConfig,
    "all": attention_transfer.AttentionTransferConfig,
    "scores": head_specific.HeadSpecificConfig,
}


def given(
    tap: str = "attention",
    layers: list[int] | None = None,
    depth: int = 4,
    heads: int = 3,
    side: int = 4,
    prefix: tuple[str, ...] = ("class",),
    width: int = 8,
    **about: Any,
) -> StoredTarget:
    layers = layers or list(range(1, depth + 1))
    tokens = len(prefix) + side * side
    last = {
        "attention": [tokens, tokens],
        "class_row": [tokens],
        "q": [tokens, width],
        "k": [tokens, width],
        "v": [tokens, width],
    }[tap]
    teacher = {"layers": depth, "heads": heads, "prefix": prefix, **about}
    return stored(tap, [len(layers), heads, *last], layers, teacher)


def rows(which: str, student: StudentSpec, *several: StoredTarget, **settings: Any) -> AttentionAligner:
    base = {"heads": None} if "heads" not in settings else {}
    return AttentionAligner("it", SETTINGS[which](**base, **settings), student, several, which)  # type: ignore[arg-type]


def random_rows(*shape: int) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(*shape).mul(2).softmax(-1)


STUDENT = StudentSpec(4, 3, 4, ("class",))


@pytest.mark.parametrize("which", ["class", "all"])
def test_equal_shapes_meet_one_to_one_and_unchanged(which):
    made = rows(which, STUDENT, given())
    target = random_rows(2, 4, 3, 17, 17)
    expected = target[..., 0, :] if which == "class" else target
    assert torch.equal(made.teacher_rows([target]), expected)
    assert made.pairs == [(1, 1), (2, 2), (3, 3), (4, 4)]


def test_class_rows_come_from_rows_maps_or_q_and_k_alike():
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 3, 17, 8), torch.randn(2, 4, 3, 17, 8)
    maps = (q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1)
    for which in ("class", "all"):
        from_maps = rows(which, STUDENT, given()).teacher_rows([maps])
        from_qk = rows(which, STUDENT, given("q"), given("k")).teacher_rows([q, k])
        assert torch.allclose(from_maps, from_qk, atol=1e-6)
    from_rows = rows("class", STUDENT, given("class_row")).teacher_rows([maps[..., 0, :]])
    assert torch.equal(from_rows, maps[..., 0, :])


def test_the_recorded_scale_of_stored_q_and_k_counts():
    q, k = torch.randn(2, 4, 3, 17, 8), torch.randn(2, 4, 3, 17, 8)
    one = given("q")
    scaled = StoredTarget(target=one.target.model_copy(update={"scales": (0.1, 0.2, 0.3, 0.4)}), teacher=one.teacher)
    found = rows("all", STUDENT, scaled, given("k"), layers=((1, 3),)).teacher_rows([q, k])
    assert torch.allclose(found[:, 0], (q[:, 2] @ k[:, 2].transpose(-2, -1) * 0.3).softmax(-1), atol=1e-6)


def test_the_student_s_rows_are_those_that_it_attends_with():
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=2
    )
    shape = student_spec(model)
    assert (shape.layers, shape.heads, shape.grid, shape.prefix) == (4, 3, 4, ("class",))
    with taps_of(model) as taps:
        model(torch.randn(2, 3, 32, 32))
    all_rows = rows("all", shape, given(), layers="uniform").student_rows(taps.attention)
    class_rows = rows("class", shape, given()).student_rows(taps.attention)
    for n in range(4):
        q, k = present(taps.attention[n].q), present(taps.attention[n].k)
        expected = (q @ k.transpose(-2, -1) * 16**-0.5).softmax(-1)
        assert torch.allclose(all_rows[:, n], expected, atol=1e-6)
        assert torch.allclose(class_rows[:, n], expected[:, :, 0], atol=1e-6)


# ---------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize(
    ("depth", "student", "wish", "expected"),
    [
        (12, 6, "uniform", [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10), (6, 12)]),
        (4, 6, "uniform", [(1, 1), (2, 1), (3, 2), (4, 3), (5, 3), (6, 4)]),
        (12, 6, "last", [(6, 12)]),
        (12, 6, "last-3", [(4, 10), (5, 11), (6, 12)]),
        (12, 6, "first-2", [(1, 1), (2, 2)]),
        (12, 6, ((1, 12), (1, 3)), [(1, 12), (1, 3)]),
    ],
)
def test_layers_meet_as_is_said(depth, student, wish, expected):
    made = rows("class", StudentSpec(student, 3, 4, ("class",)), given(depth=depth), layers=wish)
    assert made.pairs == expected
    target = random_rows(2, depth, 3, 17, 17)
    found = made.teacher_rows([target])
    assert all(torch.equal(found[:, i], target[:, b - 1, :, 0]) for i, (_, b) in enumerate(expected))


def test_a_target_of_some_layers_serves_those_that_it_holds():
    made = rows("class", StudentSpec(2, 3, 4, ("class",)), given(layers=[4, 8], depth=8), layers="uniform")
    target = random_rows(2, 2, 3, 17, 17)
    assert made.pairs == [(1, 4), (2, 8)]
    assert torch.equal(made.teacher_rows([target]), target[..., 0, :])


@pytest.mark.parametrize(
    ("student", "one", "settings", "message"),
    [
        (
            StudentSpec(6, 3, 4, ("class",)),
            {},
            {},
            r"4 layers, the student 6\n  Choose which layers meet: .*layers=uniform",
        ),
        (STUDENT, {"layers": [4]}, {}, r"holds the teacher's layers 4 of 4\n  Choose which .*layers=last"),
        (STUDENT, {"layers": [1, 2, 4]}, {"layers": "uniform"}, r"layer 3 meets the teacher's layer 3.*holds 1:2\+4"),
        (STUDENT, {}, {"layers": ((5, 1),)}, r"layer 5 meet the teacher's layer 1; the student has layers 1 to 4"),
        (STUDENT, {"heads": 6}, {}, r"6 heads, the student 3\n  Choose how they meet: `losses.it.heads=mean`"),
        (STUDENT, {"side": 8}, {}, r"grid of 8x8, the student's patches make 4x4\n.*grid=bicubic"),
        (StudentSpec(4, 3, 4, ()), {}, {}, r"the student has no class token"),
        (STUDENT, {"prefix": ()}, {}, r"the teacher has no class token"),
        (STUDENT, {}, {"layers": ()}, r"layers is empty"),
        (
            STUDENT,
            {},
            {"layers": "first-5"},
            r"layers=first-5: the student has 4 layers, the teacher 4; at most first-4",
        ),
        (STUDENT, {}, {"heads": "first-4"}, r"heads=first-4: the student has 3 heads, the teacher 3; at most first-3"),
    ],
)
def test_what_is_not_said_and_does_not_fit_is_an_error(student, one, settings, message):
    with pytest.raises(UserError, match=message):
        rows("class", student, given(**one), **settings)


# ---------------------------------------------------------------------------------------------- grids and tokens


@pytest.mark.parametrize("which", ["class", "all"])
@pytest.mark.parametrize(("theirs", "mine"), [(14, 8), (4, 8), (2, 7)])
def test_rows_on_another_grid_sum_to_one_and_keep_the_prefix(which, theirs, mine):
    made = rows(which, StudentSpec(4, 3, mine, ("class",)), given(side=theirs), grid="bicubic")
    target = random_rows(2, 4, 3, theirs**2 + 1, theirs**2 + 1)
    found = made.teacher_rows([target])
    assert found.shape[3:] == ((mine**2 + 1,) if which == "class" else (mine**2 + 1,) * 2)
    assert torch.allclose(found.sum(-1), torch.ones(()), atol=1e-5)
    assert (found >= 0).all()
    first = found if which == "class" else found[..., 0, :]
    assert torch.equal(first[..., 0], target[..., 0, 0]), "what the class token gives itself is kept"


def interpolated(patches: torch.Tensor, side: int) -> torch.Tensor:
    """The last axis, a square grid of patches, on another grid, as PyTorch does it."""
    old = round(patches.shape[-1] ** 0.5)
    grid = F.interpolate(patches.reshape(-1, 1, old, old), (side, side), mode="bicubic", align_corners=False)
    return grid.reshape(*patches.shape[:-1], side * side)


@pytest.mark.parametrize("side", [3, 8])
@pytest.mark.parametrize("which", ["class", "all"])
def test_keys_and_queries_are_resized_as_torch_does_it(which, side):
    made = rows(which, StudentSpec(4, 3, side, ("class",)), given(side=4), grid="bicubic")
    target = random_rows(2, 4, 3, 17, 17)
    keys = interpolated(target[..., 1:], side).clamp_min(0)
    keys = keys / keys.sum(-1, keepdim=True) * target[..., 1:].sum(-1, keepdim=True)
    expected = torch.cat([target[..., :1], keys], -1)
    queries = interpolated(expected[..., 1:, :].transpose(-2, -1), side).transpose(-2, -1).clamp_min(0)
    expected = torch.cat([expected[..., :1, :], queries / queries.sum(-1, keepdim=True)], -2)
    found = made.teacher_rows([target])
    assert torch.allclose(found, expected[..., 0, :] if which == "class" else expected, atol=1e-6)


def test_uniform_rows_stay_uniform_on_another_grid():
    made = rows("all", StudentSpec(4, 3, 8, ("class",)), given(side=4), grid="bicubic")
    target = torch.full((1, 4, 3, 17, 17), 1 / 17)
    found = made.teacher_rows([target])
    assert torch.allclose(found[..., 1:], torch.tensor(16 / 17 / 64), atol=1e-6)


def test_tokens_that_one_side_lacks_are_left_out_and_the_rest_rescaled():
    student = StudentSpec(4, 3, 4, ("class", "distillation"))
    made = rows("all", student, given(prefix=("class", "register", "register")))
    assert made.dropped == ["student's distillation", "teacher's register (2)"]
    assert "left out" in made.row.rule
    target = random_rows(2, 4, 3, 19, 19)
    kept = [0, *range(3, 19)]
    expected = target[..., kept, :][..., kept]
    assert torch.allclose(made.teacher_rows([target]), expected / expected.sum(-1, keepdim=True), atol=1e-6)
    q, k = [torch.randn(2, 3, 18, 8) for _ in range(4)], [torch.randn(2, 3, 18, 8) for _ in range(4)]
    mine = made.student_rows(attention_of(q, k, [8**-0.5] * 4))
    whole = (q[0] @ k[0].transpose(-2, -1) * 8**-0.5).softmax(-1)
    kept = [0, *range(2, 18)]
    expected = whole[..., kept, :][..., kept]
    assert torch.allclose(mine[:, 0], expected / expected.sum(-1, keepdim=True), atol=1e-6)


def test_tokens_meet_by_their_roles_wherever_they_stand():
    student = StudentSpec(4, 3, 4, ("class", "distillation"))
    made = rows("all", student, given(prefix=("distillation", "class")))
    target = random_rows(2, 4, 3, 18, 18)
    order = [1, 0, *range(2, 18)]
    assert torch.equal(made.teacher_rows([target]), target[..., order, :][..., order])
    assert not made.dropped


# ---------------------------------------------------------------------------------------------- heads


def test_heads_are_averaged_on_both_sides():
    made = rows("class", StudentSpec(4, 6, 4, ("class",)), given(), heads="mean")
    target = random_rows(2, 4, 3, 17, 17)
    assert torch.allclose(made.teacher_rows([target])[:, :, 0], target[..., 0, :].mean(2))
    q, k = [torch.randn(2, 6, 17, 8) for _ in range(4)], [torch.randn(2, 6, 17, 8) for _ in range(4)]
    mine = made.student_rows(attention_of(q, k, [8**-0.5] * 4))
    first = (q[2][:, :, :1] @ k[2].transpose(-2, -1) * 8**-0.5).softmax(-1)[:, :, 0].mean(1)
    assert torch.allclose(mine[:, 2, 0], first)


def test_the_first_heads_of_both_meet():
    made = rows("class", StudentSpec(4, 2, 4, ("class",)), given(), heads="first")
    target = random_rows(2, 4, 3, 17, 17)
    assert torch.equal(made.teacher_rows([target]), target[:, :, :2, 0])
    one = rows("class", STUDENT, given(), heads="first-1")
    assert torch.equal(one.teacher_rows([target]), target[:, :, :1, 0])
    assert one.row.rule.endswith("the first 1 heads")


@pytest.mark.parametrize(("average", "axis"), [("layers", 1), ("heads", 2), ("queries", 3)])
def test_the_teacher_s_maps_are_averaged_and_then_stand_for_all(average, axis):
    made = AttentionAligner(
        "it", attention_transfer.AttentionTransferConfig(layers="last-3"), STUDENT, [given()], "all", average=average
    )
    target = random_rows(2, 4, 3, 17, 17)
    found, own = made.teacher_rows([target]), target[:, 1:]
    assert torch.allclose(found, own.mean(axis, keepdim=True).expand_as(own))
    assert torch.allclose(found.sum(-1), torch.ones(()), atol=1e-6)
    assert made.row.rule.endswith(f"the teacher's averaged over {average}")


def test_a_number_stands_for_the_same_layer_on_both_sides():
    assert attention_transfer.AttentionTransferConfig(layers=[2, [3, 4]]).layers == ((2, 2), (3, 4))


@pytest.mark.parametrize(("rule", "total"), [("sum", 3), ("max", 1)])
def test_heads_are_added_up_or_their_largest_is_taken(rule, total):
    target = random_rows(2, 4, 3, 17, 17)
    found = rows("class", StudentSpec(4, 6, 4, ("class",)), given(), heads=rule).teacher_rows([target])
    assert found.shape == (2, 4, 1, 17)
    assert torch.allclose(found.sum(-1), torch.tensor(float(total)))
    merged = target[..., 0, :].sum(2) if rule == "sum" else target[..., 0, :].max(2).values
    assert torch.allclose(found[:, :, 0] / found[:, :, 0].sum(-1, keepdim=True), merged / merged.sum(-1, keepdim=True))


PAIRS = [
    (((1, 3), (4, 1)), [((0, 2), (3, 0))] * 2),
    ({2: ((1, 3),), 4: ((6, 2),)}, [((0, 2),), ((5, 1),)]),
    ("first", [((0, 0), (1, 1), (2, 2))] * 2),
]


@pytest.mark.parametrize(("wish", "expected"), PAIRS)
@pytest.mark.parametrize("which", ["class", "all", "scores"])
def test_heads_meet_by_an_explicit_map(which, wish, expected):
    """Student's layers 2 and 4 with the teacher's 3 and 1, from q and k; None of the other heads gets a gradient."""
    torch.manual_seed(0)
    student = StudentSpec(4, 6, 4, ("class",))
    made = rows(which, student, given("q"), given("k"), layers=((2, 3), (4, 1)), heads=wish)
    assert made.head_pairs == [[(a + 1, b + 1) for a, b in pairs] for pairs in expected]
    q, k = ([torch.randn(2, 6, 17, 8, requires_grad=True) for _ in range(4)] for _ in range(2))
    mine = made.student_rows(attention_of(q, k, [8**-0.5] * 4))
    stored = torch.randn(2, 2, 4, 3, 17, 8).unbind(0)
    theirs = made.teacher_rows(stored)
    assert mine.shape == theirs.shape
    for at, (own, other) in enumerate(((2, 3), (4, 1))):
        for place, (a, b) in enumerate(expected[at]):
            for queries, keys, found in (
                (q[own - 1][:, a], k[own - 1][:, a], mine),
                (stored[0][:, other - 1, b], stored[1][:, other - 1, b], theirs),
            ):
                scores = queries @ keys.transpose(-2, -1) * 8**-0.5
                whole = scores if which == "scores" else scores.softmax(-1)
                assert torch.allclose(found[:, at, place], whole[:, 0] if which == "class" else whole, atol=1e-5)
    mine.square().sum().backward()
    for own in range(4):
        met = {a for a, _ in expected[(1, 3).index(own)]} if own in (1, 3) else set()
        for layer in (q[own], k[own]):
            moved = set() if layer.grad is None else set(layer.grad.abs().amax((0, 2, 3)).nonzero()[:, 0].tolist())
            assert moved == met
    maps = random_rows(2, 4, 3, 17, 17)
    if which == "all":
        from_maps = rows(which, student, given(), layers=((2, 3), (4, 1)), heads=wish).teacher_rows([maps])
        assert torch.equal(from_maps[:, 1, -1], maps[:, 0, expected[1][-1][1]])


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (((1, 4),), r"head 1 meet the teacher's head 4; the student has heads 1 to 6, the teacher 1 to 3"),
        (((0, 1),), r"head 0 meet the teacher's head 1"),
        ({2: ((1, 1),)}, r"heads names the student's layers 2, and those that meet are 2\+4"),
        ({2: ((1, 1),), 4: ((1, 1), (2, 2))}, r"gives the layers 1, 2 pairs of heads; give each as many"),
    ],
)
def test_a_map_of_heads_that_are_not_there_is_an_error(wish, message):
    with pytest.raises(UserError, match=message):
        rows("all", StudentSpec(4, 6, 4, ("class",)), given(), layers=((2, 3), (4, 1)), heads=wish)


def test_the_table_says_which_heads_meet():
    student = StudentSpec(4, 6, 4, ("class",))
    made = rows("all", student, given(), layers=((2, 3), (4, 1)), heads={2: ((1, 3),), 4: ((6, 2),)})
    assert made.row.rule.endswith("heads 1-3 of layer 2; 6-2 of layer 4")
    assert rows("all", student, given(), heads=((2, 1),)).row.rule.endswith("heads 2-1 (student-teacher)")


def test_scores_on_another_grid_are_resized_over_keys_and_queries_and_nothing_else():
    student = StudentSpec(4, 3, 8, ("class", "distillation"))
    made = rows("scores", student, given("q"), given("k"), grid="bicubic")
    q, k = torch.randn(2, 2, 4, 3, 17, 8).unbind(0)
    found = made.teacher_rows([q, k])
    scores = q @ k.transpose(-2, -1) * 8**-0.5
    assert found.shape == (2, 4, 3, 65, 65)
    assert torch.allclose(found[..., 0, 0], scores[..., 0, 0], atol=1e-6)
    assert torch.allclose(found[..., 0, 1:], interpolated(scores[..., 0, 1:], 8), atol=1e-5)
    both = interpolated(interpolated(scores[..., 1:, 1:], 8).transpose(-2, -1), 8).transpose(-2, -1)
    assert torch.allclose(found[..., 1:, 1:], both, atol=1e-5)


def test_known_answers_of_the_logarithmic_mean():
    head = random_rows(1, 1, 1, 9)
    same = head.expand(1, 1, 6, 9)
    assert torch.allclose(log_mean(same.log(), 6).exp(), head, atol=1e-6), "T = H gives identical heads back"
    assert torch.allclose(log_mean(same.log()).exp(), head, atol=1e-6), "and is what is done without T"
    flatter = log_mean(same.log(), 10).exp()
    assert flatter.max() < head.max()
    assert torch.allclose(flatter.sum(-1), torch.ones(()))
    kl = F.kl_div(log_mean(head.log().expand(1, 1, 3, 9), 10), flatter, reduction="sum")
    assert kl > 1e-3, "6 against 3 identical heads at T = 10 differ"


def test_the_table_says_what_meets():
    made = rows(
        "class",
        StudentSpec(6, 4, 8, ("class", "distillation")),
        given(depth=12, side=14),
        layers="last",
        heads="log",
        head_temperature=10,
        grid="bicubic",
    )
    assert made.row.teacher == "class rows, layers 1:12, 3 heads, 14x14 patches"
    assert made.row.student == "6 layers x 4 heads, 8x8 patches"
    assert made.row.rule == (
        "layers 6-12 (student-teacher); mean of logarithms over heads on both sides, T = 10; patches 14x14 to 8x8 "
        "(bicubic, mass kept); left out, the rest rescaled: student's distillation"
    )


# ---------------------------------------------------------------------------------------------- classes


def logits(count: int = 3, classes: list[str] | None = None) -> StoredTarget:
    return stored("logits", [count], teacher={"classes": classes})


def test_contract_10_logits_meet_the_same_classes_alone():
    student = StudentSpec(0, 0, 0, (), 3, ("a", "b", "c"))
    assert align_classes("deit", logits(3, ["a", "b", "c"]), student, False).rule == "the same names"
    with pytest.raises(IdentityError, match=r"number of classes: the student has 3, the teacher 1000\n.*fit_teacher"):
        align_classes("deit", logits(1000), student, True)
    with pytest.raises(IdentityError, match="class 1: the student has b, the teacher c"):
        align_classes("deit", logits(3, ["a", "c", "b"]), student, True)
    for given_, shape in ((logits(3), student), (logits(3, ["a", "b", "c"]), StudentSpec(0, 0, 0, (), 3))):
        with pytest.raises(UserError, match="`same_classes=True`"):
            align_classes("deit", given_, shape, False)
        assert "same_classes" in align_classes("deit", given_, shape, True).rule
