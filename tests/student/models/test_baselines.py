"""Networks that papers compare their students with: CNNs and ConViT, trained on labels, and used as any student."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from pipeline.cli import main
from storage.errors import UserError
from tests.student.runs import run, u8

SIZES = [f"student.{name}=null" for name in ("patch_size", "embed_dim", "depth", "num_heads")]


LARGE = [pytest.param(name, marks=pytest.mark.long) for name in ("resnet34", "efficientnet_b1", "convit_small")]


@pytest.mark.parametrize("model", ["resnet10t", pytest.param("convit_tiny", marks=pytest.mark.slow), *LARGE])
def test_a_baseline_is_trained_evaluated_asked_and_exported(world, tmp_path, capsys, model) -> None:
    patch = ["student.patch_size=8"] if model.startswith("convit") else []
    out = tmp_path / "run"
    result = run(world, out, "scratch", *SIZES, f"student.model={model}", *patch, store=None, smoke=True)
    assert result["samples"] > 0
    Image.new("RGB", (40, 32), (200, 30, 30)).save(tmp_path / "red.png")
    val = ["--shards", world.shards[0]]
    for words in (
        ["evaluate", "accuracy", str(out), *val],
        ["predict", str(out), str(tmp_path / "red.png")],
        ["export", str(out), *val],
    ):
        with pytest.raises(SystemExit) as ended:
            main([*words, "--json"])
        said = json.loads(capsys.readouterr().out)
        assert ended.value.code == 0, said
    assert Path(said["graph"]).is_file()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("resnet10t", "no attention over all tokens of an image: it calls no attention kernel"),
        ("swin_tiny_patch4_window7_224", "no attention over all tokens of an image: it pools its patches"),
    ],
)
def test_what_has_no_plain_attention_cannot_be_taught_to_attend(world, tmp_path, model, message) -> None:
    with pytest.raises(UserError, match=message):
        run(world, tmp_path / "run", "aal", *SIZES, f"student.model={model}", u8(world), smoke=True)


def test_arguments_that_a_baseline_does_not_take_are_named(world, tmp_path) -> None:
    with pytest.raises(UserError, match=r"student resnet10t: cannot be made with .*patch_size"):
        run(world, tmp_path / "run", "scratch", *SIZES, "student.model=resnet10t", "student.patch_size=4", smoke=True)
