"""Similarity: a student beside itself, and beside a teacher by other means; which targets, what is refused."""

from __future__ import annotations

import json
import shlex
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("scipy")

from precompute.export.pytorch import live_teacher
from precompute.taps import Tap
from storage.shards.shard import open_shards
from storage.store.store import Store
from storage.testing import synthetic_shards
from storage.views.policy import policy
from student.alignment.student_spec import StudentSpec, student_spec
from student.alignment.student_taps import StudentTaps
from student.evaluation.similarity.compare import _chosen, _rows, _vectors
from student.evaluation.similarity.metrics import divergence, paired
from student.evaluation.similarity.teacher_targets import TeacherTargets
from student.models.files import load_student
from tests.conftest import World, run_precompute, teacher_of
from tests.manifests import stored
from tests.student.attention_copy.copying import SAME, VALIDATION, asked
from tests.student.evaluation.similarity.test_metrics import aligned
from tests.student.runs import run
from tests.typed import present

if TYPE_CHECKING:
    from pathlib import Path

    from student.targets.stored_target import StoredTarget

VIEW = policy("light", 32).evaluation


# ---------------------------------------------------------------------------------------------- through a store


@pytest.fixture(scope="module")
def trained(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of two layers of three heads, 8x8 patches."""
    out = tmp_path_factory.mktemp("similar") / "run"
    run(world, out, "scratch", "optim.epochs=1", "student.global_pool=token")
    return out


@pytest.fixture(scope="module")
def place(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the tiny teacher (three layers of three heads, 4x4 patches) for the evaluation views of a shard."""
    place = tmp_path_factory.mktemp("similar") / "store"
    wishes = [
        "attention,codec=f32",
        "q,k,codec=f32",
        "class_row,codec=f32",
        "tokens,layers=1:3,codec=f32",
        "tokens,codec=f32",
    ]
    run_precompute(place, world.shards[:1], teacher_of(world.weights, "vit"), wishes, policy=VIEW, num_views=1)
    return place


def targets_of(place: Path, tap: str) -> list[str]:
    return [id for id, m in Store.open(place).targets().items() if m.identity.tap == tap]


def streams_of(place: Path, final: bool = False) -> str:
    store = Store.open(place)
    (one,) = (id for id in targets_of(place, "tokens") if (store.target(id).identity.layers is None) == final)
    return one


def compared(capsys: Any, out: Path, world: World, store: Path, *words: Any, status: int = 0) -> Any:
    shards = ["--shards", world.shards[0], "--store", store, "--device", "cpu"]
    return asked(capsys, "evaluate", "similarity", out, *shards, *words, status=status)


def test_a_student_is_its_own_likeness(world, trained, tmp_path, capsys):
    """Its own file as a teacher, stored as f32, through the command that its card prints."""
    printed = (trained / "README.md").read_text().partition("It can be a teacher")[2].split("```")[1]
    words = shlex.split(printed.replace("\\\n", " "))[1:]
    put = {
        "SHARDS": world.shards[0],
        "STORE": str(tmp_path / "store"),
        "NAME": "itself",
        "last.safetensors": str(trained / "last.safetensors"),
    }
    views = ["--view-policy", VIEW.line, "--view-size", "32", "--num-views", "1", "--provider", "cpu"]
    wishes = ["--target", "attention,codec=f32", "--target", "tokens,layers=1:2,codec=f32"]
    asked(capsys, *(put.get(word, word) for word in words), *views, *wishes)
    for tokens in ("all", "class", "mean"):
        found = compared(capsys, trained, world, tmp_path / "store", "--tokens", tokens)
        assert (found["teacher"], found["samples"]) == ("itself", 150)
        assert [(row["student"], row["teacher"]) for row in found["attention"]["layers"]] == [(1, 1), (2, 2)]
        assert all(found["attention"]["mean"][name] == pytest.approx(0, abs=1e-7) for name in ("direct", "averaged"))
        assert all(row["cka"] == pytest.approx(1, abs=1e-6) for row in found["streams"]["layers"])


def attention(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    scale: float = q.shape[-1] ** -0.5
    return (q @ k.transpose(-2, -1) * scale).softmax(-1)


@pytest.fixture(scope="module")
def by_hand(world: World, trained: Path) -> dict[str, Any]:
    """Attention and streams of both networks, by running both."""
    from student.evaluation.batches import evaluation_batches

    model, about = load_student(trained / "last.safetensors")
    seen = StudentTaps(model, {"attention", "streams", "tokens"}, student_spec(model).attention)
    taps = [Tap("attention", layers=(1, 2, 3)), Tap("tokens", layers=(1, 2, 3)), Tap("tokens")]
    teacher = live_teacher(teacher_of(world.weights, "vit"), taps, 32)
    names = ("attention", "streams", "final")
    found: dict[str, list[Any]] = {f"{whose}{name}": [] for name in names for whose in ("", "their ")}
    with torch.no_grad():
        for batch in evaluation_batches(open_shards(world.shards[:1]), policy(about.evaluation, 32), 64):
            with seen:
                model(batch.pixels(about.mean, about.std))
            found["attention"].append(
                torch.stack([attention(*pair) for pair in zip(seen.vectors("q"), seen.vectors("k"), strict=True)], 1)
            )
            found["streams"].append(torch.stack(seen.streams, 1))
            found["final"].append(seen.tokens)
            for name, value in zip(names, teacher(batch.images), strict=True):
                found[f"their {name}"].append(value)
    return {name: torch.cat(values) for name, values in found.items()}


def test_beside_a_teacher_of_another_depth_and_grid_it_is_what_both_networks_give(
    world, trained, place, by_hand, capsys
):
    """Layers 1 and 2 meet 2 and 3; means over patches and class tokens need no grid."""
    found = compared(capsys, trained, world, place, "--target", streams_of(place), "--tokens", "mean")
    assert [(row["student"], row["teacher"]) for row in found["streams"]["layers"]] == [(1, 2), (2, 3)]
    for n, row in enumerate(found["streams"]["layers"]):
        mine, theirs = by_hand["streams"][:, n, 1:].mean(1), by_hand["their streams"][:, n + 1, 1:].mean(1)
        assert row["cka"] == pytest.approx(aligned(mine, theirs), rel=1e-4)
    classes = compared(capsys, trained, world, place, "--target", streams_of(place), "--tokens", "class")
    for n, row in enumerate(classes["streams"]["layers"]):
        mine, theirs = by_hand["streams"][:, n, 0], by_hand["their streams"][:, n + 1, 0]
        assert row["cka"] == pytest.approx(aligned(mine, theirs), rel=1e-4)


def finer(values: torch.Tensor) -> torch.Tensor:
    """`[…, 1 + 4·4]` with its patches on a grid of 8x8: `[…, 1 + 8·8]`."""
    lead = values.shape[:-1]
    patches = values[..., 1:].reshape(1, -1, 4, 4)
    patches = F.interpolate(patches, size=(8, 8), mode="bicubic", align_corners=False)
    return torch.cat([values[..., :1], patches.reshape(*lead, 64)], -1)


def test_a_coarser_teacher_is_brought_to_the_student_s_grid(world, trained, place, by_hand, capsys):
    """Keys and queries of its attention, rows keeping their mass; its tokens, patch by patch."""
    found = compared(capsys, trained, world, place, "--target", streams_of(place))
    assert "8x8" in found["attention"]["rule"]
    for n, row in enumerate(found["attention"]["layers"]):
        coarse = by_hand["their attention"][:, n + 1]
        rows = finer(coarse).clamp_min(0)
        mass = coarse[..., 1:].sum(-1, keepdim=True) / rows[..., 1:].sum(-1, keepdim=True)
        rows = torch.cat([rows[..., :1], rows[..., 1:] * mass], -1)
        rows = finer(rows.transpose(-1, -2)).transpose(-1, -2).clamp_min(0)
        rows = rows / rows.sum(-1, keepdim=True)
        assert row["direct"] == pytest.approx(float(divergence(by_hand["attention"][:, n], rows).mean()), rel=1e-3)
    for n, row in enumerate(found["streams"]["layers"]):
        theirs = finer(by_hand["their streams"][:, n + 1].transpose(1, 2)).transpose(1, 2).flatten(0, 1)
        assert row["cka"] == pytest.approx(aligned(by_hand["streams"][:, n].flatten(0, 1), theirs), rel=1e-3)


def test_attention_of_a_student_on_the_teacher_s_grid(world, place, by_hand, tmp_path, capsys):
    """Divergence of all heads with all others, of maps, of q and k alike; of class rows alone too."""
    run(world, tmp_path / "run", "scratch", *SAME, "student.num_heads=6", "optim.epochs=1", "student.global_pool=token")
    model, about = load_student(tmp_path / "run" / "last.safetensors")
    seen = StudentTaps(model, {"attention"}, student_spec(model).attention)
    from student.evaluation.batches import evaluation_batches

    matrix, count = torch.zeros(3, 6, 3), 0
    first, averaged = torch.zeros(3, 6, 3), torch.zeros(3)
    with torch.no_grad():
        for batch in evaluation_batches(open_shards(world.shards[:1]), policy(about.evaluation, 32), 64):
            with seen:
                model(batch.pixels(about.mean, about.std))
            for n in range(3):
                mine = attention(seen.vectors("q")[n], seen.vectors("k")[n])
                theirs = by_hand["their attention"][count : count + len(mine), n]
                averaged[n] += divergence(mine.mean(1), theirs.mean(1)).mean(1).sum()
                for a in range(6):
                    for b in range(3):
                        each = divergence(mine[:, a], theirs[:, b])
                        matrix[n, a, b] += each.mean(1).sum()
                        first[n, a, b] += each[:, 0].sum()
            count += len(batch.labels)
    for taps, expected in ((["attention"], matrix), (["q", "k"], matrix), (["class_row"], first)):
        chosen = [word for tap in taps for word in ("--target", targets_of(place, tap)[0])]
        found = compared(capsys, tmp_path / "run", world, place, *chosen, "--target", streams_of(place))
        for n, row in enumerate(found["attention"]["layers"]):
            assert row["direct"] is None, "six heads beside three"
            if taps != ["class_row"]:
                assert row["averaged"] == pytest.approx(float(averaged[n] / count), rel=1e-4)
            wanted = paired(expected[n] / count)
            assert [row[k] for k in ("bipartite", "min")] == pytest.approx([wanted["bipartite"], wanted["min"]], 1e-4)


def test_several_students_stand_in_one_picture_and_tokens_after_the_norm_are_of_the_last_layer(
    world, trained, place, by_hand, tmp_path, capsys
):
    out = tmp_path / "beside.svg"
    final = ["--target", streams_of(place, final=True), "--target", targets_of(place, "attention")[0]]
    found = compared(capsys, trained, world, place, trained, *final, "--tokens", "mean", "--out", out)
    one, other = found["students"]
    assert one == other
    assert one["streams"]["final"]
    assert [(row["student"], row["teacher"]) for row in one["streams"]["layers"]] == [(2, 3)]
    means = (by_hand[name].reshape(150, -1, 48)[:, 1:].mean(1) for name in ("final", "their final"))
    assert one["streams"]["mean"]["cka"] == pytest.approx(aligned(*means), rel=1e-4)
    picture = out.read_text()
    assert found["files"] == [str(out)]
    assert "<svg" in picture


# ---------------------------------------------------------------------------------------------- students that copy


def test_of_a_copying_student_the_copied_maps_are_left_out_and_its_streams_are_compared(world, place, tmp_path, capsys):
    store = tmp_path / "store"
    teacher = teacher_of(world.weights, "vit")
    wishes = ["attention,codec=f32", "q,k,codec=f32", "tokens,layers=1:3,codec=f32"]
    run_precompute(store, world.shards, teacher, wishes, policy=policy("deit", 32))
    run_precompute(store, world.shards, teacher, wishes, policy=VALIDATION, num_views=1, new_bank=True)
    for what, of_layers in (("map", [1]), ("qk", [1, 2, 3])):
        out = tmp_path / what
        run(
            world,
            out,
            "scratch",
            *SAME,
            "optim.epochs=1",
            f"attention_copy.tensors={what}",
            "attention_copy.layers=last-2",
            "stream.bank.policy=deit",
            store=Store.open(store),
        )
        taps = [word for tap in ("attention", "tokens") for word in ("--target", targets_of(store, tap)[0])]
        found = compared(capsys, out, world, store, *taps)
        assert [row["student"] for row in found["attention"]["layers"]] == of_layers
        assert ("copied" in found["left_out"]) == (what == "map")
        assert found["attention"]["layers"][0]["direct"] > 1e-4
        if what == "qk":
            assert found["attention"]["layers"][2]["direct"] == pytest.approx(0, abs=1e-6)
        assert 0 < found["streams"]["mean"]["cka"] < 1


# ---------------------------------------------------------------------------------------------- what meets


NOWHERE: Any = SimpleNamespace(url="S")  # a store of which nothing but its place is asked


def given(
    tap: str, layers: list[int] | None, depth: int, shape: list[int], prefix: tuple[str, ...] = ("class",)
) -> StoredTarget:
    return stored(tap, shape, layers, {"layers": depth, "prefix": prefix})


def test_attention_and_tokens_meet_by_the_layers_that_each_target_knows_of():
    """A ready graph says how many tensors it has of each tap, and these may differ."""
    student = StudentSpec(12, 3, 4, ("class",), width=6)
    attention, tokens = (
        given("attention", [1, 2, 3, 4], 4, [4, 3, 17, 17]),
        given("tokens", [*range(1, 13)], 12, [12, 17, 6]),
    )
    reference = TeacherTargets(NOWHERE, "t", (attention,), (tokens,))
    rows = present(_rows(student, reference, []))
    assert rows.head_pairs[0] == [(1, 1), (2, 2), (3, 3)]
    assert rows.pairs[:3] == [(1, 1), (2, 1), (3, 1)]
    assert rows.pairs[-1] == (12, 4)
    assert present(_vectors(student, reference, "all")).pairs == [(n, n) for n in range(1, 13)]


def test_class_tokens_are_found_among_tokens_that_the_teacher_has_not():
    student = StudentSpec(2, 3, 4, ("register", "class"), width=6)
    reference = TeacherTargets(NOWHERE, "t", (), (given("tokens", [1, 2], 2, [2, 17, 6]),))
    vectors = present(_vectors(student, reference, "class"))
    tokens = torch.arange(18.0).view(1, 18, 1).expand(2, 18, 6)
    kept = vectors.student_vectors([tokens, tokens])[:, 0]
    assert _chosen(kept, vectors, "class").eq(1).all()
    assert _chosen(kept, vectors, "mean").eq(torch.arange(2.0, 18).mean()).all()


# ---------------------------------------------------------------------------------------------- which targets


def test_of_several_kinds_the_one_that_is_there_of_the_images_is_taken_and_a_choice_says_its_own_kind(
    world, trained, tmp_path, capsys
):
    store, teacher = tmp_path / "store", teacher_of(world.weights, "vit")
    run_precompute(store, world.shards[:1], teacher, ["attention"])  # of training views
    run_precompute(
        store,
        world.shards[:1],
        teacher,
        ["q,k,codec=f32", "q,k,codec=f16", "tokens,layers=3"],
        policy=VIEW,
        num_views=1,
        new_bank=True,
    )
    qs, ks = targets_of(store, "q"), targets_of(store, "k")
    said = compared(capsys, trained, world, store, status=1)["error"]
    assert "4 targets fit" in said
    proposed = said.partition("Choose one: ")[2].split()
    found = compared(capsys, trained, world, store, *proposed)
    assert set(found["attention"]["targets"]) == set(proposed[1::2]) <= {*qs, *ks}
    assert found["streams"]["targets"] == targets_of(store, "tokens")
    assert not found["left_out"]
    wrong = compared(capsys, trained, world, store, "--target", qs[0], "--target", qs[1], status=1)["error"]
    assert "not of one kind" in wrong
    other = compared(capsys, trained, world, store, "--target", targets_of(store, "attention")[0], status=1)["error"]
    assert "compared with vit on stored images" in other
    foreign = compared(capsys, trained, world, world.store, "--target", world.targets["logits"], status=1)["error"]
    assert "logits of cnn; a student is compared with" in foreign


# ---------------------------------------------------------------------------------------------- errors


def test_missing_targets_come_with_the_command_that_makes_them_and_labels_are_not_needed(
    world, trained, tmp_path, capsys, monkeypatch
):
    (shard,) = synthetic_shards(tmp_path / "data", shards=1, samples=70, labels=False)
    words = ["evaluate", "similarity", trained, "--shards", shard, "--device", "cpu"]
    store = tmp_path / "store"
    run_precompute(
        store, world.shards[:1], teacher_of(world.weights, "vit"), ["attention", "tokens,layers=3,codec=f32"]
    )
    said = asked(capsys, *words, "--store", store, status=1)["error"]
    assert "compared with vit" in said
    monkeypatch.chdir(tmp_path)
    asked(capsys, *shlex.split(said[said.index("pipeline precompute") :].splitlines()[0])[1:], "--provider", "cpu")
    found = asked(capsys, *words, "--store", store)
    assert found["samples"] == 70
    assert found["attention"]["mean"]["min"] > 0
    assert found["streams"]["layers"][0]["cka"] > 0


def test_what_the_store_lacks_of_these_images_is_left_out_unless_it_is_asked_for(world, trained, tmp_path, capsys):
    store, teacher = tmp_path / "store", teacher_of(world.weights, "vit")
    run_precompute(store, world.shards[:1], teacher, ["attention"], policy=VIEW, num_views=1)
    run_precompute(store, world.shards[1:], teacher, ["tokens,layers=3"], policy=VIEW, num_views=1)
    found = compared(capsys, trained, world, store)
    assert (found["streams"], "tokens" in found["left_out"]) == (None, True)
    assert found["attention"]["mean"]["min"] > 0
    said = compared(capsys, trained, world, store, "--target", targets_of(store, "tokens")[0], status=1)["error"]
    assert "--target tokens,layers=3," in said


def test_tokens_are_asked_for_where_there_are_some(world, trained, tmp_path, capsys):
    run_precompute(
        tmp_path / "store", world.shards[:1], teacher_of(world.weights, "vit"), ["attention"], policy=VIEW, num_views=1
    )
    said = compared(capsys, trained, world, tmp_path / "store", "--tokens", "mean", status=1)["error"]
    assert "has no tokens of these images" in said


def test_what_cannot_be_compared_is_refused_in_words(world, trained, place, tmp_path, capsys):
    for words, said in (
        ([], "2 targets fit"),
        (["--teacher", "vitt"], "Did you mean 'vit'?"),
        (["--target", "vit-attentoin"], "Did you mean"),
    ):
        assert said in json.dumps(compared(capsys, trained, world, place, *words, status=1)), words
    none = compared(capsys, trained, world, world.store, "--teacher", "cnn", status=1)["error"]
    assert "activations, logits" in none
    store = tmp_path / "part"
    run_precompute(
        store, world.shards[:1], teacher_of(world.weights, "vit"), ["tokens,layers=1"], policy=VIEW, num_views=1
    )
    assert "precompute some of these" in compared(capsys, trained, world, store, status=1)["error"]
