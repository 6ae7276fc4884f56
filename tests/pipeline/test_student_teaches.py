"""A student's file serves as a teacher: the section 5 of the papers, by the commands that its recipe and card print."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from typing import TYPE_CHECKING, Any

import pytest
import torch

from pipeline.cli import main
from pipeline.recipes import loader
from storage.store.store import Store
from student.data.stream import Stream
from student.models.files import load_student

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import World

SMALL = {
    "student.embed_dim": 32,
    "student.depth": 2,
    "student.mlp_ratio": 2,
    "stream.batch_size": 32,
    "optim.epochs": 1,
    "optim.warmup_epochs": 0,
    "precision.amp_dtype": "none",
    "precision.fused_attn": True,
}


def run(capsys: Any, *words: str) -> dict[str, Any]:
    with pytest.raises(SystemExit) as ended:
        main([*words, "--json"])
    said = capsys.readouterr()
    assert ended.value.code == 0, said.out + said.err
    return dict(json.loads(said.out))


def train(world: World, capsys: Any, *words: str, **settings: Any) -> dict[str, Any]:
    chosen = [word for name, value in {**SMALL, **settings}.items() for word in ("--set", f"{name}={value}")]
    shards = [word for shard in world.shards for word in ("--shards", shard)]
    return run(capsys, "train", "--recipe", "head-specific", *shards, "--val", world.shards[0], *words, *chosen)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("taught")


def test_the_card_s_command_makes_a_student_a_teacher_of_another(world, place, capsys, monkeypatch) -> None:
    """Eight heads and a wide MLP teach four: section 5, its teacher trained here."""
    teacher = place / "teacher"
    train(
        world,
        capsys,
        "--out",
        str(teacher),
        **{
            "losses.head_specific": "null",
            "losses.crossentropy.weight": 1,
            "student.num_heads": 8,
            "student.mlp_ratio": 4,
        },
    )
    card = (teacher / "README.md").read_text()
    printed = card.partition("It can be a teacher")[2].split("```")[1].replace("\\\n", " ")
    shards = " --shards ".join(shlex.quote(shard) for shard in world.shards)
    command = printed.replace("SHARDS", shards).replace("STORE", str(place / "store")).replace("NAME", "eight")
    monkeypatch.chdir(teacher)
    views = "--view-policy light --view-size 32 --num-views 1 --provider cpu"
    made = run(capsys, *shlex.split(command)[1:], "--target", "q,k,codec=f32", "--target", "logits", *views.split())
    store = Store.open(place / "store")
    assert {store.target(id).teacher for id in made["targets"]} == {"eight"}

    model, about = load_student(teacher / "last.safetensors")
    *_, logits = made["targets"]
    batch = next(iter(Stream(world.shards, batch_size=32, store=store, targets=[logits]).epoch(0)))
    with torch.no_grad():
        live = model(batch.pixels(about.mean, about.std))
    assert torch.allclose(batch.target(logits), live, atol=1e-4)

    result = train(world, capsys, "--store", str(place / "store"), "--out", str(place / "heads"))
    assert result["targets"] == {"head_specific": made["targets"][:2]}
    rule = {"losses.head_specific.distance": "kl", "losses.head_specific.adaptive": "teacher-correct"}
    result = train(world, capsys, "--store", str(place / "store"), "--out", str(place / "kl"), **rule)
    assert result["targets"] == {"head_specific": made["targets"]}, "its classes are known: no --same-classes"
    lines = [json.loads(line) for line in (place / "kl" / "log.jsonl").read_text().splitlines()]
    assert 0 <= lines[0]["metrics"]["head_specific kept"] <= 1


def test_the_recipe_s_own_command_gives_the_teacher_that_its_student_expects() -> None:
    """What the header pastes names the sizes that the recipe and its `--set`s make."""
    header = re.sub(r"\\\n#", " ", loader.text("head-specific"))
    first, second, _ = (shlex.split(words) for words in re.findall(r"pipeline (?:train|precompute) .*", header))
    made = loader.load_recipe("head-specific", given(first, "--set"))
    assert set(made.losses) == {"crossentropy"}
    sizes = dict(pair.split("=") for pair in given(second, "--teacher-arg"))
    assert sizes.pop("num_classes") == "100"
    assert sizes == {name: str(getattr(made.student, name)) for name in sizes}
    assert given(second, "--input-size") == [str(made.student.img_size)]


def given(words: list[str], flag: str) -> list[str]:
    return [value for name, value in itertools.pairwise(words) if name == flag]
