"""Prediction equals evaluation, image by image, and bad files are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.cli import main
from storage.errors import UserError
from storage.shards.index import cached_index, read_samples
from student.evaluation.predict import found_in, predict
from student.models.files import load_student
from tests.student.runs import run


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("predict") / "run"
    run(world, out, "scratch", store=None)
    return out


@pytest.fixture(scope="module")
def photos(world, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world's samples as files in class folders."""
    folder = tmp_path_factory.mktemp("photos")
    for url in world.shards:
        index = cached_index(url)
        for sample in read_samples(url, index, range(len(index))):
            place = folder / f"class{sample.label}"
            place.mkdir(exist_ok=True)
            (place / f"{sample.key.replace('/', '-')}.png").write_bytes(sample.image)
    return folder


def test_the_share_of_right_predictions_is_the_accuracy_that_evaluate_tells(world, trained, photos) -> None:
    model, about = load_student(trained / "last.safetensors")
    files = found_in([photos])
    seen, broken = predict(model, about, files, 3)
    assert broken == []
    assert [one.image for one in seen] == [str(file) for file in files]
    right = np.mean([one.classes[0][0] == Path(one.image).parent.name for one in seen])
    result = json.loads((trained / "result.json").read_text())
    assert len(files) == result["samples"]
    assert 100 * right == pytest.approx(result["top1"], abs=0.01)
    assert all(sum(p for _, p in classes) == pytest.approx(1, abs=1e-5) for classes in (one.classes for one in seen))
    assert all(p == sorted(p, reverse=True) for p in ([p for _, p in one.classes] for one in seen))


def test_batches_change_nothing(trained, photos) -> None:
    model, about = load_student(trained / "last.safetensors")
    files = found_in([photos])[:20]
    one, many = (predict(model, about, files, 2, batch_size=size)[0] for size in (1, 20))
    for a, b in zip(one, many, strict=True):
        assert [name for name, _ in a.classes] == [name for name, _ in b.classes]
        assert np.allclose([p for _, p in a.classes], [p for _, p in b.classes], atol=1e-6)


def test_the_command_for_people_and_as_json(trained, photos, capsys) -> None:
    images = [str(path) for path in found_in([photos])[:2]]
    with pytest.raises(SystemExit) as ended:
        main(["predict", str(trained), *images, "--top", "2", "--json"])
    assert ended.value.code == 0
    result = json.loads(capsys.readouterr().out)
    assert [about["image"] for about in result["images"]] == images
    assert len(result["images"][0]["classes"]) == 2
    with pytest.raises(SystemExit):
        main(["predict", str(trained), *images])
    assert capsys.readouterr().out.startswith(f"{images[0]}: class")


def test_broken_images_are_listed_and_the_others_answered(trained, photos, tmp_path, capsys) -> None:
    """Files that macOS and notebooks hide beside images are none."""
    good = [shutil.copy(path, tmp_path / f"{i}.png") for i, path in enumerate(found_in([photos])[:3])]
    (tmp_path / "1b.png").write_bytes(b"no image")
    (tmp_path / "._1.png").write_bytes(b"Mac OS X")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    shutil.copy(good[0], tmp_path / ".ipynb_checkpoints" / "1.png")
    for words in ([], ["--json"]):
        with pytest.raises(SystemExit) as ended:
            main(["predict", str(trained), str(tmp_path), *words])
        assert ended.value.code == 1
        said = capsys.readouterr()
        assert f"error: {tmp_path / '1b.png'}: cannot be decoded" in said.err
    result = json.loads(said.out)
    assert [about["image"] for about in result["images"]] == [str(path) for path in good]
    assert [about["image"] for about in result["errors"]] == [str(tmp_path / "1b.png")]
    model, about = load_student(trained / "last.safetensors")
    files = [tmp_path / "1b.png", *map(Path, good), Path(good[0])]
    seen, broken = predict(model, about, files, 1)
    alone, _ = predict(model, about, files[1:], 1)
    assert seen == alone
    assert [one.image for one in seen] == [*map(str, good), str(good[0])]
    assert len(broken) == 1
    assert predict(model, about, files[:1], 1)[0] == []


def test_what_cannot_be_looked_at_is_named(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"none\.png: no such image or folder"):
        found_in([tmp_path / "none.png"])
    with pytest.raises(UserError, match=r"empty: no images in this folder"):
        found_in([tmp_path / "empty"])
