"""`init`: the file that it writes is a project file, and what it says next can be pasted."""

from __future__ import annotations

import json
import shlex
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline.cli import main
from pipeline.messages import as_flags
from pipeline.project.context import load
from pipeline.project.init import batch_size, init, look, sizes
from pipeline.recipes.loader import Over, load_recipe
from storage.errors import UserError
from storage.progress import NoProgress
from storage.shards.shard import Shard, open_shard, require_labels
from storage.testing import TINY_VIT, synthetic_shards
from storage.views.render import BadImage, size_in
from student.data.shuffle import BlockShuffle
from student.training.distiller import student_taps_of
from tests.typed import present

if TYPE_CHECKING:
    from tests.conftest import World


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes, one of them with an odd name, 120 images."""
    chance = np.random.default_rng(0)
    for name in ("cat", "dog: wild"):
        for i in range(60):
            place = tmp_path / "my photos" / name / f"{i}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(chance.integers(0, 255, (40, 60, 3), np.uint8)).save(place)
    return tmp_path / "my photos"


def command(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    said = shlex.split(words)
    assert said.pop(0) == "pipeline"
    with pytest.raises(SystemExit) as ended:
        main(said)
    out = capsys.readouterr()
    assert ended.value.code == 0, out.err
    return out.out


@pytest.mark.slow
def test_from_class_folders_the_commands_that_it_says_run_as_they_stand(photos, world, monkeypatch, capsys) -> None:
    monkeypatch.chdir(photos.parent)
    out = command("pipeline init 'my photos' --json", capsys)
    result = json.loads(out)
    assert (result["images"], result["classes"], result["side"]) == (120, ["cat", "dog: wild"], 40)
    project = load(Path("pipeline.yaml"))
    assert present(project.content.student).img_size == project.content.views.size == 32
    pack, plan, precompute, fit, logits, scratch, taught = result["commands"]
    assert pack == "pipeline pack 'my photos'"
    command(pack, capsys)
    make_tiny(world)
    for words in (f"{plan} --measure 0", precompute, fit, logits, f"{scratch} --smoke", f"{taught} --smoke"):
        command(words, capsys)


def make_tiny(world: World) -> None:
    """Tiny networks for those that the project file proposes, which take minutes; all else as it was written."""
    content = yaml.safe_load(Path("pipeline.yaml").read_text())
    name, arguments = TINY_VIT
    tiny = {"teacher": name, "input_size": 32, "mean": 0.5, "std": 0.5}
    for teacher, entry in content["teachers"].items():
        entry |= {**tiny, "args": {**arguments, "num_classes": 2 if teacher == "ours" else 3}}
        entry.setdefault("weights", world.weights["vit"])
    content["student"] |= {"embed_dim": 48, "depth": 2, "num_heads": 3}
    content["set"] |= {"optim.epochs": 2, "optim.warmup_epochs": 1}
    Path("pipeline.yaml").write_text(yaml.safe_dump(content))


def unlabeled(folder: Path, *names: str) -> Path:
    """A folder with an image of each name."""
    chance = np.random.default_rng(1)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(chance.integers(0, 255, (40, 60, 3), np.uint8)).save(folder / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "batch"),
    [([f"{i}.png" for i in range(60)], 8), (["2023/05/1.png", "2023/06/1.png"], 2)],
    ids=["60 in a flat folder", "two by date"],
)
def test_from_photos_without_labels_the_commands_run_as_they_stand(
    names, batch, photos, world, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(unlabeled(photos.parent / "flat", *names).parent)
    result = json.loads(command("pipeline init flat --json", capsys))
    assert (result["images"], result["labeled"], result["classes"], result["val"]) == (len(names), False, [], [])
    make_tiny(world)
    for words in result["commands"]:
        assert "--" not in words.partition("--out")[0].replace("--recipe", "")
        command(words, capsys)
    assert open_shard("shards/train-000000.tar").summary.labelled is False
    assert sorted(path.name for path in Path("shards").iterdir()) == ["train-000000.tar"], "all of them train"
    steps = [json.loads(line) for line in Path("taught/log.jsonl").read_text().splitlines()]
    assert yaml.safe_load(Path("taught/args.yaml").read_text())["stream"]["batch_size"] == batch
    assert steps[-1]["losses"].keys() == {"alignment", "guidance"}
    assert Path("taught/student.onnx").is_file()
    photos.rename("labeled")
    pack, knn, tuned = result["with_labels"]
    command(pack, capsys)
    scores = json.loads(command(f"{knn} --json", capsys))
    assert (scores["samples"], scores["train"]["samples"]) == (12, 108)
    command(tuned, capsys)
    trained = json.loads(Path("tuned/result.json").read_text())
    assert trained["samples"] == 12
    weights = yaml.safe_load(Path("tuned/args.yaml").read_text())["student"]["weights"]
    assert Path(weights).resolve() == Path("taught/last.safetensors").resolve()


def test_a_project_for_photos_without_labels_has_a_label_free_student(photos, monkeypatch, capsys) -> None:
    monkeypatch.chdir(unlabeled(photos.parent / "flat", *(f"{i}.png" for i in range(20))).parent)
    out = command("pipeline init flat", capsys)
    assert out.splitlines()[0] == "pipeline.yaml: 20 images, no labels, about 40 pixels"
    assert "for validation: none (without labels, students are not scored)" in out
    project = load(Path("pipeline.yaml"))
    assert project.said("val") is None
    (entry,) = project.content.teachers.values()
    assert entry.targets == ("class_token", "class_row,layers=last")
    assert project.content.views.policy == "rrc(0.2,1)|flip"
    recipe = load_recipe("attndistill-small", over=Over(where="", settings=project.settings))
    assert recipe.losses.keys() == {"alignment", "guidance"}
    assert "labels" not in student_taps_of(recipe)
    assert recipe.stream.batch_size == 4
    student = project.content.student
    assert present(student).num_classes is None


def test_shards_without_labels_are_all_trained_on(tmp_path, monkeypatch, capsys) -> None:
    """Also a single one; unless names say that some are for validation."""
    synthetic_shards(tmp_path / "data", shards=1, samples=30, labels=False)
    monkeypatch.chdir(tmp_path)
    result = json.loads(command("pipeline init data --json", capsys))
    assert result["commands"] == [
        "pipeline plan",
        "pipeline precompute",
        "pipeline train --recipe attndistill-small --out taught",
        "pipeline export taught",
    ]
    assert load(Path("pipeline.yaml")).said("shards") == ["data/shard-000000.tar"]
    assert (result["labeled"], result["val"]) == (False, [])
    synthetic_shards(tmp_path / "data", shards=1, samples=10, labels=False, stem="val")
    found = look(Path("data"), Path(), NoProgress())
    assert (found.images, found.shards, found.val) == (40, ["data/shard-000000.tar"], ["data/val-000000.tar"])


def test_a_project_file_elsewhere_says_where_unlabeled_shards_go(photos, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    unlabeled(Path("flat"), "1.png", "2.png")
    Path("there").mkdir()
    pack, *others = init(Path("flat"), Path("there/p.yaml"), NoProgress())["commands"]
    assert pack == "pipeline pack flat there/shards/train-000000.tar"
    assert all(words.endswith("--project there/p.yaml") for words in others)
    command(pack, capsys)
    assert [str(path) for path in Path("there/shards").iterdir()] == load(Path("there/p.yaml")).said("shards")


@pytest.mark.parametrize("images", [2, 3, 7, 8, 60, 511, 512, 5000, 200_000])
def test_a_batch_fits_the_images(images) -> None:
    """All of them in four batches or more; and, of classes of two, the half that is left for training."""
    size = batch_size(images)
    assert BlockShuffle([(0, 0, np.arange(images))], size).steps >= min(4, images // 2)
    assert BlockShuffle([(0, 0, np.arange(max(2, images // 2)))], size).steps >= 1
    assert size == (512 if images == 200_000 else 128 if images >= 512 else size)


def test_knn_without_labels_says_what_to_do(tmp_path, monkeypatch, capsys) -> None:
    """In such a project, where no validation shards are named, and with shards that have no labels."""
    (shard,) = synthetic_shards(tmp_path, shards=1, samples=8, labels=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "classes.json").unlink()
    (tmp_path / "last.safetensors").write_bytes(b"")
    Path("pipeline.yaml").write_text(f"shards: {shard}\n")
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "knn", "last.safetensors"])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert "'--shards'" in said
    assert "`pipeline pack` makes them from one folder of images per class, or from a CSV" in " ".join(said.split())
    with pytest.raises(UserError, match="has no label") as error:
        require_labels(open_shard(shard))
    assert "pipeline pack labeled labeled-shards/train-000000.tar --val-fraction 0.1" in as_flags(str(error.value))


def test_a_project_file_elsewhere_is_named_in_every_command(photos, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    result = init(photos, Path("there/p.yaml"), NoProgress())
    pack, *others = result["commands"]
    assert all(words.endswith("--project there/p.yaml") for words in others)
    command(pack, capsys)
    assert load(Path("there/p.yaml")).said("shards") == ["there/shards/train-000000.tar"]
    assert load(Path("there/p.yaml")).said("val") == ["there/shards/train-val-*.tar"]
    assert Path("there/shards/train-000000.tar").is_file()
    assert Path("there/shards/train-val-000000.tar").is_file()


def test_shards_are_taken_as_they_are(tmp_path, monkeypatch) -> None:
    shards = synthetic_shards(tmp_path / "data", shards=3, samples=20)
    (tmp_path / "home").mkdir()
    result = init(tmp_path / "data", tmp_path / "home" / "p.yaml", NoProgress())
    assert result["images"] == 60
    assert result["commands"][0].startswith("pipeline plan --teacher vit_tiny --project")
    project = load(tmp_path / "home" / "p.yaml")
    said = [Path(path).resolve() for path in (*project.said("shards"), *project.said("val"))]
    assert said == [Path(path).resolve() for path in shards]
    assert len(project.said("val")) == 1
    assert result["val_because"] == "the last one, as no name says val, valid, validation or test"
    assert result["val_because"] in (tmp_path / "home" / "p.yaml").read_text()


def test_validation_shards_are_told_by_whole_words_in_their_names(tmp_path, capsys) -> None:
    stems = {"latest", "carnival", "interval2", "x-val", "Test", "val2", "my-validation", "a_valid_b"}
    for stem in stems:
        synthetic_shards(tmp_path / "data", shards=1, samples=4, stem=stem)
    held = {Path(path).name for path in look(tmp_path / "data", tmp_path, NoProgress()).val}
    assert held == {f"{stem}-000000.tar" for stem in stems - {"latest", "carnival", "interval2"}}
    (tmp_path / "data" / "carnival-000000.tar").rename(tmp_path / "carnival")
    out = command(f"pipeline init {tmp_path / 'data'} --out {tmp_path / 'p.yaml'}", capsys)
    assert "for validation: data/Test-000000.tar, data/a_valid_b-000000.tar, data/my-validation-000000.tar, …" in out
    assert "(their names say val, valid, validation or test)" in out
    for name in ("latest", "interval2"):
        (tmp_path / "data" / f"{name}-000000.tar").unlink()
    with pytest.raises(UserError, match="leave none for training"):
        look(tmp_path / "data", tmp_path, NoProgress())


def test_of_many_shards_a_few_are_read(tmp_path, monkeypatch, capsys) -> None:
    synthetic_shards(tmp_path / "data", shards=20, samples=30)
    read = []

    def counted(url: str, **how: Any) -> Shard:
        read.append(url)
        return open_shard(url, **how)

    monkeypatch.setattr("precompute.plan.open_shard", counted)
    out = command(f"pipeline init {tmp_path / 'data'} --out {tmp_path / 'p.yaml'} --json", capsys)
    result = json.loads(out)
    assert len(read) <= 8
    assert result["estimated"] == 20 - len(read)
    assert result["images"] == pytest.approx(600, rel=0.1)
    assert (tmp_path / "p.yaml").read_text().startswith("# about ")


@pytest.mark.filterwarnings("error")
def test_hostile_images_are_passed_over(photos) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def png(width: int, *more: bytes) -> bytes:
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, width, 8, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")

    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 26)))
    for name, data in (("0", png(20000)), ("1", png(10000)), ("2", png(8, text)), ("3", b""), ("4", b"BM" * 99)):
        (photos / "cat" / f"{name}.png").write_bytes(data)
    (photos / "cat" / "._5.png").write_bytes(b"Mac OS X")
    found = look(photos, photos.parent, NoProgress())
    assert (found.images, found.side) == (120, 40)
    with pytest.raises(BadImage, match="cannot be decoded"):
        size_in(photos / "cat" / "0.png")
    assert size_in(photos / "cat" / "2.png") == (8, 8)
    assert size_in(photos / "cat" / "1.png") == (10000, 10000)


@pytest.mark.parametrize(("side", "expected"), [(28, (32, 4)), (64, (64, 8)), (128, (128, 16)), (500, (224, 16))])
def test_sizes_follow_the_images(side, expected) -> None:
    assert sizes(side) == expected


def test_without_a_project_file_pack_asks_for_names(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for content in (None, "store: S"):
        if content:
            Path("pipeline.yaml").write_text(content)
        with pytest.raises(SystemExit) as ended:
            main(["pack", "photos"])
        assert ended.value.code == 2
        assert (
            "name the new shards, such as: pipeline pack photos 'train-{000000..000009}.tar'" in capsys.readouterr().err
        )


def test_what_is_no_data_set_is_refused(tmp_path, photos) -> None:
    with pytest.raises(UserError, match="no such folder"):
        look(tmp_path / "none", tmp_path, NoProgress())
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images found"):
        look(tmp_path / "empty", tmp_path, NoProgress())
    synthetic_shards(tmp_path / "one", shards=1, samples=20)
    with pytest.raises(UserError, match=r"leave none for validation; cut some off: pipeline pack"):
        look(tmp_path / "one", tmp_path, NoProgress())
    (tmp_path / "p.yaml").write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        init(photos, tmp_path / "p.yaml", NoProgress())
    assert (tmp_path / "p.yaml").read_text() == "mine"
