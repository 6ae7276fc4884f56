"""`init`: the file that it writes is a project file, and what it says next can be pasted."""

from __future__ import annotations

import json
import shlex
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline.cli import main
from pipeline.project.context import load
from pipeline.project.init import init, look, sizes
from storage.errors import UserError
from storage.progress import NoProgress
from storage.shards.shard import Shard, open_shard
from storage.testing import TINY_VIT, synthetic_shards
from storage.views.render import BadImage, size_in
from tests.typed import present


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
    content = yaml.safe_load(Path("pipeline.yaml").read_text())  # tiny networks: the proposed ones take minutes
    name, arguments = TINY_VIT
    tiny = {"teacher": name, "input_size": 32, "mean": 0.5, "std": 0.5}
    content["teachers"]["vit_tiny"] |= {
        **tiny,
        "weights": world.weights["vit"],
        "args": {**arguments, "num_classes": 3},
    }
    content["teachers"]["ours"] |= {**tiny, "args": {**arguments, "num_classes": 2}}
    content["student"] |= {"embed_dim": 48, "depth": 2, "num_heads": 3}
    content["set"] |= {"stream.batch_size": 8}
    Path("pipeline.yaml").write_text(yaml.safe_dump(content))
    for words in (f"{plan} --measure 0", precompute, fit, logits, f"{scratch} --smoke", f"{taught} --smoke"):
        command(words, capsys)


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
    with pytest.raises(UserError, match="neither shards nor images in class folders"):
        look(tmp_path / "empty", tmp_path, NoProgress())
    synthetic_shards(tmp_path / "one", shards=1, samples=20)
    with pytest.raises(UserError, match=r"leave none for validation; cut some off: pipeline pack"):
        look(tmp_path / "one", tmp_path, NoProgress())
    (tmp_path / "p.yaml").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        init(photos, tmp_path / "p.yaml", NoProgress())
    assert (tmp_path / "p.yaml").read_text() == "mine"
