"""A tour of a newcomer's mistakes through the real command line. Contract 13: each ends in one message that says what
is wrong, where, and what to do; exit status 1, or 2 for usage; no traceback; what was complete stays as it was.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cli import cli, main
from storage.rng import generator
from storage.testing import TINY_CNN, synthetic_image, synthetic_shards
from tests.conftest import HANGS, ROOT
from tests.pipeline.every_command import every_command
from tests.pipeline.mistakes import AS_TYPED, PREPARING, Mistake
from tests.pipeline.mistakes_of_training import TRAINING
from tests.storage.helpers import samples, write_tar
from tests.student.runs import STUDENT

SHORT = {
    "@DATA": "--shards 'shard-{000000..000001}.tar' --val shard-000001.tar",
    "@SMALL": " ".join(f"--set {setting}" for setting in STUDENT),
    "@CNN": f"--teacher {TINY_CNN[0]} --weights cnn.safetensors --teacher-arg num_classes=3 --mean 0.5 --std 0.5 "
    + " ".join(f"--teacher-arg '{name}={value}'" for name, value in TINY_CNN[1].items()),
}

MISTAKES = [*PREPARING, *TRAINING]


@pytest.fixture(scope="module")
def place(world, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as it lies about after a first hour: photos, shards, a store, a run, and things that are none."""
    home = tmp_path_factory.mktemp("home")
    chance = generator("photos")
    for label, name in enumerate(("cat", "dog", "fox")):
        (home / "photos" / name).mkdir(parents=True)
        for i in range(6):
            synthetic_image(label, chance).save(home / "photos" / name / f"{i}.jpg")
    for name in ("empty", "heic/cat", "heic/dog", "five", "changed", "new"):
        (home / name).mkdir(parents=True)
    for name in ("heic/cat/1.heic", "heic/dog/1.heic", "notes.txt"):
        (home / name).write_text("no image")
    for name in ("cnn", "vit"):
        shutil.copy(world.weights[name], home / f"{name}.safetensors")
    data = Path(world.shards[0]).parent
    for name in ("shard-000000.tar", "shard-000001.tar", "classes.json"):
        shutil.copy(data / name, home)
        shutil.copy(data / name, home / "five")
    (home / "five" / "classes.json").write_text(json.dumps(list("abcde")))
    shutil.copy(data / "shard-000000.tar", home / "changed" / "shard-000001.tar")
    shutil.copy(data / "classes.json", home / "changed")
    world.copy(home / "S")
    synthetic_shards(home / "other", shards=1, samples=20, classes=5, stem="val")
    for name in ("parts/train", "parts/val", "gap"):
        shutil.copytree(home / "photos", home / name)
    (home / "gap" / "none").mkdir()
    shutil.copytree(home / "photos", home / "linked")
    (home / "linked" / "cat" / "moved").symlink_to("nowhere")
    write_tar(home / "failed" / "shard-000000.tar", [*samples(4), ("lost.json", b"{}"), ("lost.txt", b"a cat")])
    shutil.copytree(home / "S", home / "rootless")
    (home / "rootless" / "zarr.json").unlink()
    shutil.copytree(home / "S", home / "damaged")
    for chunk in (home / "damaged" / "targets").glob("cnn-logits-*/*/*/*/data/c/0/0"):
        chunk.write_bytes(b"\0" + chunk.read_bytes()[1:])
    (home / "list.yaml").write_text("teachers: [vit_tiny]\n")
    (home / "epochs.yaml").write_text("epochs: 3\n")
    (home / "gone.yaml").write_text(
        "shards: shard-000000.tar\nstore: new/S\nteachers: {vit_tiny: {weights: gone.pth}}\n"
    )
    (home / "tabs.yaml").write_text("losses:\n\tcrossentropy: {}\n")
    (home / "typo.yaml").write_text("shard: shard-000000.tar\n")
    (home / "teacher.yaml").write_text("shards: shard-000000.tar\nstore: S\nteachers: {mobilnet: {}}\n")
    recipe = (ROOT / "pipeline" / "recipes" / "scratch.yaml").read_text()
    (home / "mine.yaml").write_text(recipe)
    (home / "edited.yaml").write_text(recipe.replace("\nseed: 0", "\nseed: 1"))
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(home)
        shutil.copytree("photos", "worse")
        for i in range(20):
            Path(f"worse/cat/{i}.jpg").write_bytes(Path("photos/cat/1.jpg").read_bytes()[: 300 if i == 9 else None])
        shutil.copytree("photos/cat", "alone")
        Path("alone/list.csv").write_text("path,label\n" + "".join(f"{i}.jpg,cat\n" for i in range(6)))
        Path("single").mkdir()
        shutil.copy("photos/cat/0.jpg", "single")
        for typed in (
            "pack worse broken/shard.tar",
            "pack alone/list.csv one/one.tar",
            "train --recipe mine.yaml @DATA --out run @SMALL",
        ):
            with pytest.raises(SystemExit) as ended:
                main(words_of(typed))
            assert ended.value.code == 0
    return home


def words_of(typed: str) -> list[str]:
    for short, long in SHORT.items():
        typed = typed.replace(short, long)
    return shlex.split(typed)


def kept(place: Path) -> dict[str, tuple[int, int]]:
    """Everything in the folder that a mistake may not touch."""
    files = [path for path in place.rglob("*") if path.relative_to(place).parts[0] != "new"]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.is_file()}


def check(mistake: Mistake, place: Path, before: dict[str, tuple[int, int]], status: int, out: str, err: str) -> None:
    """That an end is as contract 13 says."""
    assert status == mistake.status, err
    assert "Traceback" not in err
    assert "internal error" not in err
    starts = {1: "error: ", 2: "Error: "}[status]
    (at,) = [number for number, line in enumerate(err.splitlines()) if line.startswith(starts)]
    first, *more = err.splitlines()[at:]
    assert all(line.startswith("  ") for line in more), "more than one message"
    message = "\n".join([first.removeprefix(starts), *more])
    for part in mistake.says:
        assert part in message
    assert len(message) < 700
    for line in more:  # a command that stands alone is one to be pasted
        if line.startswith("  pipeline "):
            words = shlex.split(line)[1:]
            name = next(name for name in reversed(every_command()) if words[: len(name.split())] == name.split())
            every_command()[name].make_context(name, words[len(name.split()) :])  # raises where it cannot be parsed
    assert out == ""
    assert kept(place) == before


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_ends_in_one_message_with_the_way_out(mistake, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    before = kept(place)
    with pytest.raises(SystemExit) as ended:
        main(words_of(mistake.typed))
    check(mistake, place, before, int(str(ended.value.code)), *capsys.readouterr())
    with pytest.raises(SystemExit) as again:
        main([*words_of(mistake.typed), "--json"])
    assert again.value.code == ended.value.code
    assert json.loads(capsys.readouterr().out).keys() == {"error"}
    shutil.rmtree(place / "new")
    (place / "new").mkdir()


@pytest.mark.slow
@pytest.mark.parametrize("mistake", AS_TYPED, ids=lambda mistake: mistake.name)
def test_the_same_in_a_process_of_its_own(mistake, place, tmp_path):
    before = kept(place)
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-m", "pipeline", *words_of(mistake.typed)],
        cwd=place,
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    check(mistake, place, before, run.returncode, run.stdout, run.stderr)


def test_the_tour_is_long_and_every_command_has_a_part_in_it():
    typed = [mistake.typed.split()[0] for mistake in (*MISTAKES, *AS_TYPED)]
    assert len(typed) >= 20
    assert {*cli.commands} - {*typed} <= {"recipes", "teachers", "verify", "export", "demo"}
