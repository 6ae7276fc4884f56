"""Attention Copy: targets that validation images miss, and slips in a recipe: each with the way out."""

from __future__ import annotations

import shlex

import pytest

from pipeline.messages import as_flags
from storage.errors import UserError
from storage.store.store import Store
from storage.views.policy import policy
from student.recipe.validate import validate
from tests.conftest import run_precompute, teacher_of
from tests.student.attention_copy.copying import SAME, asked, synthetic_png
from tests.student.runs import run


def test_targets_of_validation_images_that_are_missing_are_made_by_the_command_that_is_said(
    world, tmp_path, monkeypatch, capsys
):
    """Before anything is trained; pasted, the command makes them, and the same run goes through."""
    store = tmp_path / "store"
    teacher = teacher_of(world.weights, "vit")
    run_precompute(store, world.shards[:1], teacher, ["q,k,layers=2:3"], policy=policy("light", 32), num_views=1)
    settings = [*SAME, "attention_copy.layers=last-2", "optim.epochs=1"]
    parts = {"store": Store.open(store), "shards": world.shards[:1], "val": world.shards[1:]}
    with pytest.raises(UserError, match=r"needs it of the images that it is evaluated on") as refused:
        run(world, tmp_path / "run", "scratch", *settings, **parts)
    assert not (tmp_path / "run").exists()
    pasted = as_flags(str(refused.value)).splitlines()[-1].strip()
    assert "--new-bank" not in pasted
    words = shlex.split(pasted)[1:]
    asked(capsys, *words)
    result = run(world, tmp_path / "run", "scratch", *settings, **parts)
    assert result["samples"] == 150
    told = asked(capsys, "evaluate", "accuracy", tmp_path / "run", "--shards", world.shards[0], status=1)
    assert "--new-bank" in told["error"].splitlines()[-1]
    asked(capsys, *shlex.split(told["error"].splitlines()[-1].strip())[1:])
    assert asked(capsys, "evaluate", "accuracy", tmp_path / "run", "--shards", world.shards[0])["samples"] == 150
    store.rename(tmp_path / "moved")
    gone = asked(capsys, "evaluate", "accuracy", tmp_path / "run", "--shards", world.shards[0], status=1)
    assert "no store" in gone["error"]
    pictured = ["predict"], [tmp_path / "a.png"]
    for command, words in ((["evaluate", "accuracy"], ["--shards", world.shards[0]]), pictured):
        (tmp_path / "a.png").write_bytes(synthetic_png())
        asked(capsys, *command, tmp_path / "run", *words, "--store", tmp_path / "moved")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"attention_copy": {"tensors": "all"}}, r"attention_copy.tensors"),
        ({"attention_copy": {"heads": "mean"}}, r"attention_copy.heads: expected a rule that this loss takes"),
        ({"attention_copy": {"layers": "first"}}, r"attention_copy.layers: expected last, uniform, first-N, last-N"),
        ({"attention_copy": {"layers": "first-0"}}, r"attention_copy.layers: expected last, uniform, first-N, last-N"),
        (
            {"attention_copy": {"tensors": "q", "average": "heads"}},
            r"average applies to maps, and tensors=q reads none",
        ),
        ({"attention_copy": {"wat": "q"}}, r"attention_copy.wat: no such setting"),
        ({"losses": {"attention_copy": {"type": "attention"}}}, r"attention_copy is a section beside losses"),
        ({"losses": {"attention": {"tensors": "k", "reduce_heads": "sum"}}}, r"reduce_heads applies to maps"),
    ],
)
def test_slips_in_a_recipe_are_named(content, message):
    with pytest.raises(UserError, match=message):
        validate({"losses": {"crossentropy": {}}, **content}, "test")
