"""The documentation's own claims: the walks of the architecture page, its picture, and the library's program."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from pipeline.cli import main
from storage.testing import TINY_CNN, synthetic_shards
from tests.conftest import HANGS, World

if TYPE_CHECKING:
    from types import CodeType, FrameType

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text()

Station = tuple[str, str]  # file and function


def walk(heading: str) -> list[Station]:
    """The stations below a heading."""
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^(\d+)\. `([\w/]+\.py)` `([\w.]+)`: ", section, re.MULTILINE)
    assert [int(number) for number, *_ in rows] == list(range(1, len(rows) + 1))
    return [(file, function) for _, file, function in rows]


WALKS = {heading: walk(heading) for heading in ("From a tar to a gradient", "From a tar to a target")}


@pytest.mark.parametrize("heading", WALKS)
def test_each_station_exists_and_there_are_at_most_twelve(heading: str) -> None:
    assert 8 <= len(WALKS[heading]) <= 12
    for file, function in WALKS[heading]:
        body: list[Any] = ast.parse((ROOT / file).read_text()).body
        for name in function.split("."):
            (node,) = (node for node in body if getattr(node, "name", "") == name)
            body = node.body


class Entered:
    """In which order functions are entered for the first time, in any thread that begins meanwhile."""

    def __init__(self, stations: list[Station]) -> None:
        self.stations = {(str(ROOT / file), function): (file, function) for file, function in stations}
        self.known: dict[CodeType, Station | None] = {}
        self.order: list[Station] = []

    def __enter__(self) -> Entered:
        threading.setprofile(self.note)
        sys.setprofile(self.note)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def note(self, frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event == "call" and code not in self.known:
            station = self.known[code] = self.stations.get((code.co_filename, code.co_qualname))
            if station:
                self.order.append(station)


def entered(stations: list[Station], *words: object) -> list[Station]:
    with Entered(stations) as noted, pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert ended.value.code == 0
    return noted.order


def test_the_walks_are_those_of_the_code(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name, arguments = TINY_CNN
    pairs = [w for k, v in {**arguments, "num_classes": 3}.items() for w in ("--teacher-arg", f"{k}={v}")]
    shards = [word for shard in world.shards for word in ("--shards", shard)]
    to_target, to_gradient = WALKS["From a tar to a target"], WALKS["From a tar to a gradient"]
    assert to_target == entered(
        to_target,
        "precompute",
        "--teacher",
        name,
        "--weights",
        world.weights["cnn"],
        *pairs,
        "--mean",
        0.5,
        "--std",
        0.5,
        "--input-size",
        64,
        *shards,
        "--store",
        "S",
        "--view-policy",
        "light",
        "--view-size",
        32,
        "--target",
        "activations,grid=8",
        "--provider",
        "cpu",
    )
    assert to_gradient == entered(
        to_gradient,
        "train",
        "--recipe",
        "aal-small",
        *shards,
        "--val",
        world.shards[0],
        "--store",
        "S",
        "--out",
        "run",
        "--set",
        "stream.batch_size=32",
        "--smoke",
    )


def test_the_picture_shows_what_there_is() -> None:
    picture = (ROOT / "docs" / "rooms.svg").read_text()
    rooms = re.split(r'class="name"[^>]*>(\w+)<', picture)[1:]
    assert rooms[::2] == ["pipeline", "precompute", "student", "storage"]
    for room, drawn in zip(rooms[::2], rooms[1::2], strict=True):
        parts = {part for part in re.findall(r'class="label"[^>]*>([\w ]+)<', drawn) if " " not in part}
        folders = {path.parent.name for path in (ROOT / room).glob("*/__init__.py")}
        assert folders <= parts, "each folder is drawn"
        assert parts <= folders | {path.stem for path in (ROOT / room).glob("*.py")}


def test_the_tutorial_makes_its_images_and_gives_the_commands_of_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`tests/pipeline/test_readme.py` runs these commands."""
    page = (ROOT / "docs" / "tutorial.md").read_text()
    readme = (ROOT / "README.md").read_text().partition("## From a folder to a student\n")[2].split("```")[1]
    commands = [line for line in page.splitlines() if line.startswith("pipeline ")]
    assert commands == [line.partition("  #")[0].strip() for line in readme.strip().splitlines()]
    monkeypatch.chdir(tmp_path)
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(program, {})
    assert len(list(tmp_path.glob("photos/digit ?/*.png"))) == 1797
    with pytest.raises(SystemExit) as ended:
        main(commands[0].split()[1:])
    assert ended.value.code == 0
    project = yaml.safe_load(Path("pipeline.yaml").read_text())
    (changes,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    for section, settings in yaml.safe_load(changes).items():
        assert settings.keys() <= project[section].keys(), "what the tutorial changes is in the file"


@pytest.mark.slow
def test_the_program_of_the_library_page_runs(tmp_path: Path) -> None:
    import timm
    import torch
    from safetensors.torch import save_file

    synthetic_shards(tmp_path, 2, 64, stem="train")
    synthetic_shards(tmp_path, 1, 32, stem="val", seed=1)
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "teacher.safetensors")
    program = (ROOT / "docs" / "library.py").read_text()
    (tmp_path / "library.py").write_text(program)
    words = ["train-{000000..000001}.tar", "val-000000.tar", "test_vit", "teacher.safetensors", "out"]
    run = subprocess.run(
        [sys.executable, "library.py", *words], cwd=tmp_path, capture_output=True, text=True, timeout=HANGS
    )
    assert run.returncode == 0, run.stderr
    assert re.fullmatch(
        r"test_vit-embedding-f16-\w{8} 256 64 deviation \d.*\nepoch 0: loss .*\nepoch 1: loss .*\n"
        r"top-1 \d.* % on 32 samples\n",
        run.stdout,
    ), run.stdout
    sections = re.findall(r"# --8<-- \[start:(\w+)\]", program)
    shown = re.findall(r'--8<-- "docs/library.py:(\w+)"', (ROOT / "docs" / "library.md").read_text())
    assert sections == shown, "the page shows all of it, in order"


def test_the_page_on_networks_of_one_s_own_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Teacher and student from two files: attention and maps, then export, prediction, and torchvision's ResNet."""
    import numpy as np
    import torch

    from storage.testing import synthetic_image

    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "own-networks.md").read_text()
    for name, text in re.findall(r'```\w+ title="([\w.]+)"\n(.*?)```', page, re.DOTALL):
        Path(name).write_text(text)
    synthetic_shards(".", 1, 64, stem="train")
    synthetic_shards(".", 1, 32, stem="val", seed=1)
    synthetic_image(1, np.random.default_rng(0)).save("photo.png")
    scope: dict[str, Any] = {}
    exec(Path("my_teacher.py").read_text(), scope)
    torch.manual_seed(0)
    torch.save(scope["build"]().state_dict(), "my_teacher.pth")
    commands = [
        shlex.split(line)[1:]
        for block in re.findall(r"```\n(pipeline .*?)```", page, re.DOTALL)
        for line in block.replace("\\\n", "").splitlines()
    ]
    assert [words[0] for words in commands] == ["precompute", "train", "train", "predict", "export"]
    for words in commands:
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0, words
    assert Path("run/network.py").read_text() == Path("my_student.py").read_text()
    assert Path("run/student.onnx").is_file()
