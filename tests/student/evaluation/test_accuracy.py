"""Accuracy: ranks of classes, sets of some of the classes, ensembles, classes by their number of training images."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from pipeline.cli import main
from storage.errors import IdentityError, UserError
from storage.shards.index import cached_index
from storage.shards.shard import open_shards
from storage.testing import synthetic_shards
from student.evaluation.batches import evaluation_batches
from student.evaluation.class_metrics import class_metrics, label_ranks
from student.evaluation.ensemble import Classifier, ensemble_predictions
from student.models.files import StudentDescription, load_student
from tests.student.runs import run
from tests.typed import present

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of other seeds."""
    folder = tmp_path_factory.mktemp("accuracy")
    for seed in range(2):
        run(world, folder / str(seed), "scratch", f"seed={seed}", store=None)
    return [folder / "0", folder / "1"]


@pytest.fixture
def tell(capsys):
    def call(*words: object, status: int = 0) -> Any:
        with pytest.raises(SystemExit) as ended:
            main([*map(str, words), "--json"])
        said = capsys.readouterr()
        assert ended.value.code == status, said.err
        return json.loads(said.out)

    return call


class Fixed(torch.nn.Module):
    """Says the logits of a table, one row an image after another."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table, self.at = table, 0

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        self.at += len(pixels)
        return self.table[self.at - len(pixels) : self.at]


def about(classes: int, names: tuple[str, ...] | None = None) -> StudentDescription:
    half = (0.5, 0.5, 0.5)
    return StudentDescription(
        model="fixed",
        arguments={"num_classes": classes},
        img_size=16,
        mean=half,
        std=half,
        classes=names,
        evaluation="short(1)|center",
    )


def test_a_place_counts_the_classes_before_the_right_one_and_no_number_beats_nothing() -> None:
    scores = torch.tensor([[3.0, 2, 1], [1, 2, 3], [2, 2, 2], [2, 2, 2], [torch.nan] * 3, [1, torch.nan, 0]])
    assert label_ranks(scores, torch.tensor([0, 0, 0, 2, 0, 0])).tolist() == [0, 2, 0, 2, 2, 1]


def test_chosen_samples_are_those_of_the_whole(world) -> None:
    from storage.views.policy import policy

    chosen = [np.array([0, 5, 63, 64, 149]), np.array([70])]
    view = policy("eval", 32)
    whole = list(evaluation_batches(open_shards(world.shards), view, 64))
    some = list(evaluation_batches(open_shards(world.shards), view, 64, chosen=chosen))
    ids = torch.cat([part.ids for part in some])
    assert ids[:, :2].tolist() == [[0, 0], [0, 5], [0, 63], [0, 64], [0, 149], [1, 70]]
    every = torch.cat([part.images for part in whole])
    assert torch.equal(torch.cat([part.images for part in some]), every[[0, 5, 63, 64, 149, 220]])


def test_a_student_with_itself_is_as_good_as_alone(world, trained) -> None:
    one, described = load_student(trained[0] / "last.safetensors")
    two, other = load_student(trained[1] / "last.safetensors")
    twice = [Classifier(name="a", model=one, about=described), Classifier(name="b", model=one, about=described)]
    found = ensemble_predictions(twice, open_shards(world.shards), ensemble=True)
    assert torch.equal(found.ranks[0], found.ranks[2])
    both = ensemble_predictions(
        [Classifier(name="a", model=one, about=described), Classifier(name="b", model=two, about=other)],
        open_shards(world.shards),
        ensemble=True,
    )
    assert torch.equal(both.ranks[0], found.ranks[0])
    assert not torch.equal(both.ranks[0], both.ranks[1])


def test_an_ensemble_averages_probabilities_and_not_logits(world) -> None:
    """One is sure, the other wavers between two wrong classes, with logits that would win."""
    (url,) = world.shards[:1]
    labels = torch.tensor(cached_index(url).labels)
    right = torch.nn.functional.one_hot(labels, 3).float()
    members = [
        Classifier(name="sure", model=Fixed(5 * right), about=about(3)),
        Classifier(name="wavers", model=Fixed(50 * (1 - right)), about=about(3)),
    ]
    found = ensemble_predictions(members, open_shards([url]), ensemble=True)
    assert [int((ranks == 0).sum()) for ranks in found.ranks] == [150, 0, 150]


def test_a_set_of_some_classes_is_answered_among_these(tmp_path) -> None:
    """As ImageNet-A: its list is a part of the student's, in another order."""
    names = ("a", "b", "c", "d")
    (url,) = synthetic_shards(tmp_path, shards=1, samples=30, classes=2)
    (tmp_path / "classes.json").write_text('["d", "b"]')
    labels = torch.tensor(cached_index(url).labels)
    table = torch.zeros(30, 4)
    table[:, [0, 2]] = 9  # classes that the set has not
    table[torch.arange(30), torch.tensor([3, 1])[labels]] = 1
    found = ensemble_predictions([Classifier(name="x", model=Fixed(table), about=about(4, names))], open_shards([url]))
    assert (found.num_classes, found.names) == (2, ("d", "b"))
    assert int((found.ranks == 0).sum()) == 30
    (tmp_path / "classes.json").write_text('["d", "e"]')
    with pytest.raises(IdentityError, match="classes: expected 4"):
        ensemble_predictions([Classifier(name="x", model=Fixed(table), about=about(4, names))], open_shards([url]))


def test_members_of_other_classes_are_refused(world) -> None:
    shards = open_shards(world.shards[:1])
    table = torch.zeros(150, 4)
    with pytest.raises(UserError, match="second has 4 classes, first 3"):
        ensemble_predictions(
            [
                Classifier(name="first", model=Fixed(table[:, :3]), about=about(3)),
                Classifier(name="second", model=Fixed(table), about=about(4)),
            ],
            shards,
            ensemble=True,
        )
    with pytest.raises(UserError, match="label 2 is out of range: small has classes 0 to 1"):
        ensemble_predictions([Classifier(name="small", model=Fixed(table[:, :2]), about=about(2))], shards)


def test_parts_by_training_images() -> None:
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    ranks = torch.tensor([0, 0, 0, 3, 5, 4])
    images = {0: 101, 1: 100, 2: 19, 3: 20}
    metrics = class_metrics(labels, ranks, 6, train_images=images)
    assert (metrics.top1, metrics.top5, metrics.samples) == (50.0, 83.333, 6)
    shots = present(metrics.shots)
    parts = [shots.many, shots.medium, shots.few]
    assert [part.top1 for part in parts] == [100.0, 50.0, 0.0]
    assert [part.classes for part in parts] == [1, 2, 3]
    assert [one.top1 for one in metrics.classes] == [100.0, 50.0, 0.0]
    assert sum(present(part.top1) * part.samples for part in parts) / 6 == pytest.approx(metrics.top1)
    none = present(class_metrics(labels, ranks, 6, train_images={0: 101}, bounds=(0, 200)).shots).many
    assert none.top1 is None
    assert metrics.to_json()["few"] == {"classes": 3, "samples": 2, "top1": 0.0}
    assert "few" not in class_metrics(labels, ranks, 6).to_json()


def test_several_sets_and_parts_through_the_command(world, trained, tell, tmp_path) -> None:
    first, second = world.shards
    result = tell(
        "evaluate", "accuracy", trained[0], "--shards", first, "--shards", f"other={second}", "--shot-bounds", "20,100"
    )
    alone = [tell("evaluate", "accuracy", trained[0], "--shards", url) for url in (first, second)]
    assert result["top1"] == alone[0]["top1"]
    assert result["sets"]["other"]["top1"] == alone[1]["top1"]
    assert result["samples"] == result["sets"]["other"]["samples"] == 150
    assert sum(one["samples"] for one in result["classes"]) == 150
    counts = [sum(list(cached_index(url).labels).count(n) for url in world.shards) for n in range(3)]
    recorded = json.loads((trained[0] / "run.json").read_text())["images"]
    assert recorded == {str(n): count for n, count in enumerate(counts)}
    assert sum(result[part]["classes"] for part in ("many", "medium", "few")) == 3
    given = tell(
        "evaluate", "accuracy", trained[0], "--shards", first, "--shot-bounds", "20,100", "--train-shards", first
    )
    assert given["medium"]["classes"] == sum(20 <= list(cached_index(first).labels).count(n) <= 100 for n in range(3))
    whole = tell("evaluate", "accuracy", trained[0], "--shards", f"{first}::{second}")
    assert whole["top1"] == pytest.approx((alone[0]["top1"] + alone[1]["top1"]) / 2, abs=0.001)
    named = tmp_path / "split=1.tar"  # a path, and no name of a set
    shutil.copy(first, named)
    assert "sets" not in tell("evaluate", "accuracy", trained[0], "--shards", named)


def test_an_ensemble_through_the_command(world, trained, tell, capsys) -> None:
    words = ["evaluate", "accuracy", *trained, "--shards", world.shards[0]]
    result = tell(*words, "--ensemble")
    assert [one["top1"] for one in result["students"]] == [
        tell("evaluate", "accuracy", one, "--shards", world.shards[0])["top1"] for one in trained
    ]
    assert "ensemble" not in tell(*words)
    same = tell("evaluate", "accuracy", trained[0], trained[0], "--shards", world.shards[0], "--ensemble")
    assert same["ensemble"]["top1"] == same["students"][0]["top1"]
    with pytest.raises(SystemExit):
        main([str(word) for word in (*words, "--ensemble")])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["ensemble", "150", f"{result['ensemble']['top1']:.2f}", "-"] in rows


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--shot-bounds", "100,20"], 2, "expected LOW,HIGH"),
        (["--shot-bounds", "many"], 2, "expected LOW,HIGH"),
        (["--ensemble"], 2, "two RUNs or more"),
        (["--label-fraction", "1%"], 2, "No such option '--label-fraction'"),
        (["--shards", "ood="], 1, "a name without shards"),
        (["--shards", "ood=nowhere.tar"], 1, "nowhere.tar: no such shard"),
    ],
)
def test_mistakes_are_told(world, trained, capsys, words, status, message) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "accuracy", str(trained[0]), "--shards", world.shards[0], *words])
    assert ended.value.code == status
    assert message in capsys.readouterr().err


def test_a_run_that_does_not_say_its_images_is_told_how(world, trained, tmp_path, capsys) -> None:
    shutil.copy(trained[0] / "last.safetensors", tmp_path / "last.safetensors")
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "accuracy", str(tmp_path), "--shards", world.shards[0], "--shot-bounds", "20,100"])
    assert ended.value.code == 1
    assert "does not say how many training images" in capsys.readouterr().err
