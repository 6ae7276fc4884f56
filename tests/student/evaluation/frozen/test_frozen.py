"""Frozen features: k-NN against scikit-learn, the probe, labeled parts; what is evaluated is never learned from."""

from __future__ import annotations

import csv
import json
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import pytest
import timm
import torch

from pipeline.cli import main
from pipeline.commands.evaluate.options import fraction
from storage.errors import UserError
from storage.shards.index import cached_index
from storage.shards.pack import pack
from storage.shards.shard import open_shards
from storage.testing import synthetic_shards
from student.evaluation.frozen.features import Features, class_feature, features_of, probe_feature
from student.evaluation.frozen.knn import knn_ranks, usable, votes
from student.evaluation.frozen.label_subset import label_subset
from student.evaluation.frozen.linear_probe import heads, logits_of, search_learning_rate
from student.models.files import load_student
from tests.student.runs import run

if TYPE_CHECKING:
    from pathlib import Path

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 5, "num_heads": 3, "num_classes": 3}


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("frozen") / "run"
    run(world, out, "scratch", store=None)
    return out


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Shards with images that the world has not."""
    return synthetic_shards(tmp_path_factory.mktemp("others"), shards=2, samples=90, classes=3, seed=7)


@pytest.fixture
def tell(capsys):
    def call(*words: object, status: int = 0) -> tuple[dict[str, Any], str]:
        with pytest.raises(SystemExit) as ended:
            main([*map(str, words), "--json"])
        said = capsys.readouterr()
        assert ended.value.code == status, said.err
        return json.loads(said.out), said.err

    return call


def clusters(count: int, classes: int, width: int = 16, seed: int = 0, noise: float = 1.0) -> Features:
    chance = np.random.default_rng(seed)
    centers = np.random.default_rng(99).normal(size=(classes, width))
    labels = chance.integers(classes, size=count)
    values = centers[labels] + noise * chance.normal(size=(count, width))
    return Features(values=torch.tensor(values, dtype=torch.float32), labels=torch.tensor(labels))


@pytest.mark.parametrize("k", [1, 10, 20, 200])
def test_k_nn_is_that_of_scikit_learn(k) -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    bank, asked = clusters(300, 12), clusters(150, 12, seed=1)
    theirs = neighbors.KNeighborsClassifier(
        k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07), algorithm="brute"
    ).fit(bank.values.double(), bank.labels)
    ours = torch.cat([by_k[k] for by_k in votes(bank, asked.values, [k], 12)])
    assert np.allclose(ours / ours.sum(1, keepdim=True), theirs.predict_proba(asked.values.double()), atol=1e-5)
    right = float((knn_ranks(bank, asked, [k], 12)[k] == 0).float().mean())
    assert right == pytest.approx(theirs.score(asked.values.double(), asked.labels))
    together = knn_ranks(bank, asked, [200, 1, 20, 10], 12)[k]
    assert torch.equal(together, knn_ranks(bank, asked, [k], 12)[k])


def test_one_neighbor_on_its_own_bank_is_always_right() -> None:
    bank = clusters(200, 10, noise=3)
    assert int((knn_ranks(bank, bank, [1], 10)[1] == 0).sum()) == 200


def test_a_class_without_a_vote_is_never_among_five() -> None:
    bank = Features(values=torch.eye(2), labels=torch.tensor([0, 1]))
    asked = Features(values=torch.eye(2)[[0, 0]], labels=torch.tensor([2, 1]))
    assert knn_ranks(bank, asked, [2], 8)[2].tolist() == [8, 1]
    assert usable(60) == [10, 20, 50]
    assert usable(4) == [4]


def test_class_tokens_are_those_after_the_final_norm() -> None:
    pixels = torch.rand(2, 3, 32, 32)
    vit = timm.create_model("vit_tiny_patch16_224", **SMALL).eval()
    deit = timm.create_model("deit_tiny_distilled_patch16_224", **SMALL).eval()
    pooled = timm.create_model("vit_tiny_patch16_224", global_pool="avg", **SMALL).eval()
    bare = timm.create_model("vit_tiny_patch16_224", global_pool="avg", class_token=False, **SMALL).eval()
    for model in (vit, deit):
        assert torch.equal(class_feature(model, pixels), model.forward_features(pixels)[:, 0])
        tokens = []
        hooks = [b.register_forward_hook(lambda _, __, out: tokens.append(out)) for b in model.blocks]  # noqa: B023
        model(pixels)
        for hook in hooks:
            hook.remove()
        expected = torch.cat([model.norm(out)[:, 0] for out in tokens[-4:]], 1)
        assert torch.allclose(probe_feature(model, pixels), expected, atol=1e-6)
    for model in (pooled, bare):
        patches = model.forward_features(pixels)[:, model.num_prefix_tokens :]
        assert torch.allclose(class_feature(model, pixels), model.fc_norm(patches.mean(1)), atol=1e-6)
        assert torch.equal(probe_feature(model, pixels), class_feature(model, pixels))
    pit = timm.create_model("pit_ti_224", num_classes=3).eval()  # no list of blocks
    large = torch.rand(1, 3, 224, 224)
    assert torch.equal(probe_feature(pit, large), pit.forward_head(pit.forward_features(large), pre_logits=True))
    wide = timm.create_model("vit_tiny_patch16_224", **{**SMALL, "embed_dim": 768, "depth": 1}).eval()
    last = wide.forward_features(pixels)
    assert torch.allclose(probe_feature(wide, pixels), torch.cat([last[:, 0], last[:, 1:].mean(1)], 1), atol=1e-6)


def test_classifiers_side_by_side_are_those_alone_and_those_of_torchs_sgd() -> None:
    features = clusters(300, 4)
    weight, bias = heads(features, 4, [0.01, 0.1], seed=3, epochs=5)
    alone = heads(features, 4, [0.1], seed=3, epochs=5)
    assert torch.allclose(weight[1], alone[0][0], atol=1e-6)
    assert torch.allclose(bias[1], alone[1][0], atol=1e-6)
    chance = torch.Generator().manual_seed(3)
    linear = torch.nn.Linear(16, 4)
    linear.weight.data = torch.randn(4, 16, generator=chance) * 0.01
    linear.bias.data.zero_()
    sgd = torch.optim.SGD(linear.parameters(), 0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 5, 0)
    for _ in range(5):
        for rows in torch.split(torch.randperm(300, generator=chance), 256):
            sgd.zero_grad()
            torch.nn.functional.cross_entropy(linear(features.values[rows]), features.labels[rows]).backward()
            sgd.step()
        schedule.step()
    assert torch.allclose(linear.weight.data, alone[0][0], atol=1e-4)
    assert torch.allclose(linear.bias.data, alone[1][0], atol=1e-4)


def test_a_probe_finds_what_is_linear_and_takes_the_best_rate() -> None:
    features, asked = clusters(400, 3, noise=0.1), clusters(100, 3, seed=1, noise=0.1)
    tried = search_learning_rate(features, 3, (1e-9, 0.1), epochs=20)
    assert [one.lr for one in tried] == [0.1, 1e-9]
    head = heads(features, 3, [tried[0].lr], epochs=20)
    assert bool((logits_of(head, asked.values).argmax(1) == asked.labels).all())
    diverged = search_learning_rate(clusters(400, 3), 3, (3e38, 0.01), epochs=3)
    assert diverged[0].lr == 0.01
    with pytest.raises(UserError, match="no class has two labeled samples"):
        search_learning_rate(Features(values=torch.eye(3), labels=torch.arange(3)), 3)


@pytest.mark.parametrize(("text", "share"), [("1%", 0.01), ("10 %", 0.1), ("0.1", 0.1), ("100%", 1.0)])
def test_parts_as_people_write_them(text, share) -> None:
    assert fraction(text) == pytest.approx(share)
    for wrong in ("0%", "101%", "some", "nan", "1%%", "-1%", ""):
        with pytest.raises(click.BadParameter, match="expected a fraction of the training samples"):
            fraction(wrong)


def test_a_part_is_balanced_the_one_that_pack_keeps_and_written_down(world, others, tmp_path) -> None:
    mine = label_subset(open_shards(others), open_shards(world.shards), fraction=0.1, seed=5)
    labels = [label for *_, label in mine.rows]
    whole = [label for url in others for label in cached_index(url).labels]
    assert [labels.count(n) for n in range(3)] == [max(1, round(whole.count(n) / 10)) for n in range(3)]
    packed = pack(others, str(tmp_path / "part-000000.tar"), fraction=0.1, seed=5, shuffle=False)
    kept = [digest for url in packed.train for digest in cached_index(url).digests]
    chosen = zip(others, mine.chosen, strict=True)
    assert kept == [cached_index(url).digests[i] for url, rows in chosen for i in rows]
    mine.write(tmp_path / "list.csv")
    with (tmp_path / "list.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["shard", "key", "label"], *[[shard, key, str(n)] for shard, key, n in mine.rows]]
    assert label_subset(open_shards(others), open_shards(world.shards), fraction=0.1, seed=5).digest == mine.digest
    assert label_subset(open_shards(others), open_shards(world.shards), fraction=0.1, seed=6).digest != mine.digest


def test_what_is_evaluated_is_not_learned_from(world, others) -> None:
    first, second = world.shards
    mine = label_subset(open_shards([first, *others]), open_shards(second))
    assert mine.left_out == 0
    again = label_subset(open_shards([first, *others]), open_shards(first))
    assert (again.left_out, len(again.rows)) == (150, 180)
    with pytest.raises(UserError, match="nothing is left to learn from"):
        label_subset(open_shards(first), open_shards([second, first]))


def test_both_protocols_through_the_command(world, others, trained, tell, tmp_path) -> None:
    words = [trained, "--shards", others[1], "--train-shards", others[0]]
    near, _ = tell("evaluate", "knn", *words)
    assert set(near["knn"]) == {"10", "20", "50"}
    assert near["samples"] == near["train"]["samples"] == 90
    model, about = load_student(trained / "last.safetensors")
    bank, asked = (features_of(model, about, open_shards(url), class_feature) for url in others)
    right = 100 * float((knn_ranks(bank, asked, [20], 3)[20] == 0).float().mean())
    assert near["knn"]["20"]["top1"] == pytest.approx(right, abs=0.01)
    fitted, _ = tell("evaluate", "linear-probe", *words, "--label-fraction", "50%", "--list", tmp_path / "l.csv")
    assert len(fitted["tried"]) == 8
    assert fitted["lr"] == fitted["tried"][0]["lr"]
    assert fitted["train"]["samples"] == len((tmp_path / "l.csv").read_text().splitlines()) - 1 == 45
    again, _ = tell("evaluate", "linear-probe", *words, "--label-fraction", "50%", "--lr", fitted["lr"])
    assert again["tried"] == []
    assert again["top1"] == fitted["top1"]
    assert again["train"]["sha256"] == fitted["train"]["sha256"]
    leaking, err = tell("evaluate", "knn", *words, "--train-shards", others[1])
    assert leaking["knn"] == near["knn"]
    assert "90 training image(s) are also evaluated" in err


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["knn"], 2, "Missing option '--train-shards'"),
        (["knn", "--lr", "1"], 2, "No such option '--lr'"),
        (["knn", "--train-shards", "{first}"], 1, "nothing is left to learn from"),
        (["linear-probe", "--train-shards", "{other}", "--label-fraction", "2"], 2, "'2': expected a fraction"),
        (["linear-probe", "--train-shards", "{other}", "--label-fraction", "1%"], 1, "--lr 0.001"),
        (["knn", "--train-shards", "{other}", "--shards", "x={other}"], 1, "give the shards alone"),
        (["knn", "{run}", "--train-shards", "{other}"], 2, "unexpected extra argument"),
        (["knn", "--train-shards", "{other}", "--list", "no/where.csv"], 1, "no/.where.csv"),
    ],
)
def test_mistakes_are_told(world, others, trained, capsys, words, status, message) -> None:
    fill = {"first": world.shards[0], "other": others[0], "run": trained}
    command, *more = (word.format(**fill) for word in words)
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", command, str(trained), "--shards", world.shards[0], *more])
    assert ended.value.code == status
    assert message in capsys.readouterr().err
