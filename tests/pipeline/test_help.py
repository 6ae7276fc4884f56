"""What `--help` shows: the list of commands answers at once and is whole, and every example runs when it is pasted."""

from __future__ import annotations

import inspect
import io
import json
import os
import shlex
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from pipeline.cli import cli, main
from storage.constants import SHORT_NAMES
from storage.rng import generator
from storage.testing import synthetic_image
from tests.conftest import ROOT
from tests.pipeline.every_command import every_command
from tests.storage.helpers import write_tar

if TYPE_CHECKING:
    from pathlib import Path

    import click

# Minutes long; that their words are understood is enough, `make demo` runs the one, its own test the other.
PARSED_ONLY = ("demo", "bench")
# An order in which each finds what those before it left; `init` is last, for its project file speaks to all others.
ORDER = (
    "pack",
    "teachers",
    "recipes",
    "plan",
    "precompute",
    "verify",
    "inspect",
    "train",
    "fit-teacher",
    "evaluate",
    "evaluate accuracy",
    "evaluate knn",
    "evaluate linear-probe",
    "evaluate localize",
    "evaluate similarity",
    "evaluate cost",
    "predict",
    "aal-links",
    "export",
    "demo",
    "bench",
    "init",
)
SHORT_RUN = ("stream.batch_size=16", "optim.epochs=1", "optim.warmup_epochs=0", "precision.amp_dtype=none")
# What makes an example quick for few images, and changes nothing else.
QUICK = {
    "plan": ["--measure", "0"],
    "precompute": ["--num-views", "1"],
    "verify": ["--samples", "4"],
    "evaluate linear-probe": ["--lr", "0.01"],
    "evaluate cost": ["--batch-size", "1"],
    "train": [word for setting in SHORT_RUN for word in ("--set", setting)],
}
# What an example finds in the folder beside what those before it left.
BEFORE = {
    "evaluate similarity": [
        "precompute",
        "--teacher",
        "vit_tiny",
        "--weights",
        "vit_tiny.safetensors",
        "--shards",
        "train-val-000000.tar",
        "--store",
        "S",
        "--view-policy",
        "short(1)|center",
        "--view-size",
        "32",
        "--target",
        "attention",
    ],
}


def examples(command: click.Command) -> list[list[str]]:
    """The words of each command in a help text's examples; a line that ends in a backslash goes on."""
    block = inspect.cleandoc(command.help or "").rpartition("\b\n")[2]
    lines = block.replace("\\\n", " ").splitlines()
    found = [shlex.split(line) for line in lines if line.startswith("pipeline ")]
    return [words[1:] for words in found]


# Which installed packages a command imports; those that Python imports by itself as it starts do not count.
IMPORTED = """
import sys
before = set(sys.modules)
from pipeline.cli import main
try:
    main({words!r})
except SystemExit:
    pass
files = {{name: getattr(sys.modules[name], "__file__", None) or "" for name in set(sys.modules) - before}}
found = {{name.partition(".")[0] for name, file in files.items() if "site-packages" in file}}
print("installed:", *sorted(found), file=sys.stderr)
"""


@pytest.mark.parametrize("words", [["--help"], *([*name.split(), "--help"] for name in every_command())], ids=" ".join)
def test_help_answers_at_once_because_it_imports_click_alone(words):
    code = IMPORTED.format(words=words)
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stderr.splitlines()[-1] == "installed: click"


@pytest.mark.parametrize("group", [cli, cli.commands["evaluate"]], ids=lambda group: group.name)
def test_no_summary_is_cut_off(group):
    words = [] if group is cli else [group.name]
    run = subprocess.run(
        [sys.executable, "-m", "pipeline", *words, "--help"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "80"},
        capture_output=True,
        text=True,
        check=True,
    )
    listed = run.stdout.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in listed] == sorted(group.commands)
    assert not [line for line in listed if line.endswith("...")]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `photos` of two classes and weights under the names that the examples use."""
    import onnx
    import timm
    import torch
    from onnx import TensorProto, helper
    from safetensors.torch import save_file

    from precompute.teachers import teacher

    for name, model in (("mobilenetv2", "test_efficientnet"), ("vit_tiny", "test_vit")):  # quick ones of their kinds
        monkeypatch.setitem(SHORT_NAMES, name, (model, 160))

    chance = generator("photos")
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(20):
            synthetic_image(label, chance).save(tmp_path / "photos" / name / f"{i}.jpg")
    (tmp_path / "list.csv").write_text(
        "path,label\n" + "".join(f"photos/{name}/{i}.jpg,{name}\n" for name in ("cat", "dog") for i in range(20))
    )
    passes_on = helper.make_node("Identity", ["images"], ["output"])
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 3, 16, 16])
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", 3, 16, 16])
    onnx.save(helper.make_model(helper.make_graph([passes_on], "g", [images], [output])), tmp_path / "model.onnx")
    torch.manual_seed(0)
    for name in ("mobilenetv2", "vit_tiny"):
        save_file(timm.create_model(teacher.resolve(name)[0]).state_dict(), tmp_path / f"{name}.safetensors")
    picture = io.BytesIO()
    synthetic_image(0, chance).save(picture, "PNG")
    box = json.dumps({"bbox": [2, 2, 20, 20]}).encode()
    write_tar(tmp_path / "boxed-000000.tar", [("a.png", picture.getvalue()), ("a.cls", b"0"), ("a.json", box)])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_has_an_example_and_its_place_in_the_order():
    assert sorted(ORDER) == sorted(every_command())
    assert all(examples(command) for command in every_command().values())


def test_the_examples_of_the_whole_are_understood(photos, capsys):
    """Those that fetch weights from timm's hub are not run; the first writes the project file that they read."""
    (first, *words), *others = examples(cli)
    assert first == "init"
    with pytest.raises(SystemExit) as ended:
        main([first, *words])
    assert ended.value.code == 0
    assert len(others) == 4
    for words in others:
        name = next(name for name in reversed(every_command()) if words[: len(name.split())] == name.split())
        every_command()[name].make_context(name, words[len(name.split()) :])  # raises where it cannot be parsed


@pytest.mark.slow
def test_every_example_runs_as_it_stands(photos, capsys):
    """One after another, each in the folder that those before it left."""
    for name in ORDER:
        if name in BEFORE:
            with pytest.raises(SystemExit):
                main(BEFORE[name])
        for words in examples(every_command()[name]):
            assert words[: len(name.split())] == name.split()
            if name in PARSED_ONLY:
                cli.commands[name].make_context(name, words[1:])
                continue
            with pytest.raises(SystemExit) as ended:
                main([*words, *QUICK.get(name, [])])
            said = capsys.readouterr()
            assert ended.value.code == 0, f"pipeline {shlex.join(words)}\n{said.err}"
