"""`aal-links`: the heat map of a run's links and what Algorithm 1 keeps, as a table, as JSON and as a picture."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from pipeline.cli import main
from student.losses.parts import aal_links as of
from student.settings import LinksConfig
from tests.student.runs import run, u8
from tests.typed import present

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import World


@pytest.fixture(scope="module")
def trained(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("links") / "a run"
    run(world, out, "aal", u8(world))
    return out


def call(capsys: Any, *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return int(str(ended.value.code)), said.out, said.err


def test_the_heat_map_is_that_of_the_links_and_writes_nothing(trained, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in trained.iterdir()}
    code, out, _ = call(capsys, "aal-links", trained, "--json")
    assert code == 0
    found = json.loads(out)
    weights = load_file(trained / "losses.safetensors")["aal.aal.links.weight"][:, :, 0].double().abs().numpy()
    ends = np.cumsum([0, 8, 12, 16, 24])
    expected = [[weights[a:b, 3 * n : 3 * n + 3].mean() for n in range(2)] for a, b in itertools.pairwise(ends)]
    assert np.allclose(found["heat"], expected)
    assert [stage["channels"] for stage in found["stages"]] == [8, 12, 16, 24]
    assert found["heads"] == [3, 3]
    assert before == {path.name: path.stat().st_mtime_ns for path in trained.iterdir()}


def test_what_it_says_to_train_with_keeps_what_it_shows(trained, capsys):
    trained_links = of.read(trained, None)
    layout, sizes = trained_links.layout, trained_links.weights.abs().double()
    blocks = (layout.heat(trained_links.weights) - sizes.min()) / (sizes.max() - sizes.min())
    words = ("aal-links", trained, "--threshold", float(blocks.median()), "--granularity", "block")
    (_, out, _), (_, plain, _) = call(capsys, *words), call(capsys, *words, "--json")
    selection = json.loads(plain)["selection"]
    assert 0 < selection["kept"] < selection["of"]
    commands = [shlex.split(line.partition(": ")[2]) for line in out.splitlines() if "--set" in line]
    assert len(commands) == 1 + (selection["ranges"] is not None)
    for command in commands:
        from pipeline.recipes.loader import load_recipe

        settings = [word for word in command if word != "--set"]
        loss: Any = load_recipe("aal", settings).losses["aal"]
        kept = of.kept("aal", loss.links, layout, 4)
        assert layout.count(present(kept.choice)) == selection["kept"]


def test_printed_keeps_every_link_and_it_is_said(trained, capsys):
    code, out, _ = call(capsys, "aal-links", trained, "--normalize", "printed")
    assert code == 0
    assert "keeps 360 of 360 links, 100.0 %\n  printed puts a weight of 0 near the middle of 0 to 1" in out
    assert "--set" not in out
    _, out, _ = call(capsys, "aal-links", trained, "--threshold", 0.99)
    assert "keeps 0 of 360 links, 0.0 %\n  no link is kept" in out


def test_links_of_a_smoke_run_are_called_so(world, tmp_path, capsys):
    run(world, tmp_path / "smoke", "aal", u8(world), smoke=True)
    assert "a smoke run, whose links have learned nothing" in call(capsys, "aal-links", tmp_path / "smoke")[1]
    assert json.loads(call(capsys, "aal-links", tmp_path / "smoke", "--json")[1])["smoke"] is True


def test_the_picture_is_one_and_never_writes_over_something_else(trained, tmp_path, capsys):
    for name in ("links.png", "links.svg", "links.pdf"):
        code, out, _ = call(capsys, "aal-links", trained, "--out", tmp_path / name, "--json")
        assert (code, json.loads(out)["picture"]) == (0, str(tmp_path / name))
    pixels = np.asarray(Image.open(tmp_path / "links.png").convert("RGB"))
    assert min(pixels.shape[:2]) > 200
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    words = re.sub(r"<[^>]+>", " ", (tmp_path / "links.svg").read_text())
    assert "layer of the student" in words or "<!-- layer of the student -->" in (tmp_path / "links.svg").read_text()
    (tmp_path / "notes.png").write_text("mine")
    code, _, err = call(capsys, "aal-links", trained, "--out", tmp_path / "notes.png")
    assert (code, (tmp_path / "notes.png").read_text()) == (1, "mine")
    assert "not a picture" in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["aal-links", "{tmp}/none"], "no links here (losses.safetensors is missing)"),
        (["aal-links", "{run}", "--loss", "all"], "has no links of 'all'"),
        (["aal-links", "{run}", "--threshold", "1"], "Invalid value for '--threshold'"),
        (["aal-links", "{run}", "--out", "links.txt"], "a picture's name ends in"),
    ],
)
def test_mistakes_end_in_one_message(trained, tmp_path, capsys, words, says):
    code, out, err = call(capsys, *(word.format(tmp=tmp_path, run=trained) for word in words))
    assert code in (1, 2)
    assert says in err
    assert not out


def test_defaults_of_the_command_are_those_of_the_setting_but_for_the_granularity():
    assert LinksConfig(run="r").model_dump(exclude={"run", "loss"}) == {
        "normalize": "abs",
        "granularity": "channel",
        "threshold": 0.05,
    }
