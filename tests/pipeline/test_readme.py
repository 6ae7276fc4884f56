"""What README and docs show is run as it stands there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import yaml

from storage.shards.index import build_index, read_samples
from storage.store.codecs import Codec
from storage.store.native_maps import NativeMaps
from storage.store.store import Store
from storage.views.view import COLUMNS
from tests.conftest import HANGS, ROOT, World, run_precompute, teacher_of

if TYPE_CHECKING:
    from pathlib import Path


def python_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


def prepare(world: World, folder: Path) -> None:
    """`train-000000.tar`, `train-000001.tar` and a store `S` with one target."""
    from storage.shards.pack import pack

    pack(world.shards, str(folder / "train-{000000..000001}.tar"))
    shards = [str(folder / f"train-{n:06d}.tar") for n in range(2)]
    run_precompute(folder / "S", shards, teacher_of(world.weights, "cnn"), ["activations,grid=8"])


@pytest.mark.slow
def test_the_loop_in_the_guide_is_15_lines_and_runs(world, tmp_path):
    (loop,) = (block for block in python_blocks("docs/guide.md") if "Stream" in block)
    assert len([line for line in loop.splitlines() if line.strip()]) == 15
    prepare(world, tmp_path)
    (tmp_path / "loop.py").write_text(loop + '    print("seen", *seen.shape, batch.images.dtype)\n')
    run = subprocess.run(
        [sys.executable, "loop.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["seen", "32", "60", "8", "8", "torch.uint8"]


def test_the_reader_in_the_docs_needs_the_standard_library_and_numpy_alone(world, tmp_path, monkeypatch):
    reader, _ = python_blocks("docs/store-format.md")
    imported = set(re.findall(r"^import (.*)$", reader, re.MULTILINE))
    assert imported == {"base64, json, pathlib", "numpy as np"}
    (tmp_path / "S").symlink_to(world.store)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(reader, names)
    store = Store.open(world.store)
    marker = names["marker"]
    task = next(t for t in store.done() if t.name == names["path"].name)
    assert marker["id"] == task.id
    expected = store.marker(task).arrays[names["name"]].read(0, len(names["values"]))
    assert np.array_equal(names["values"], expected)


# A target of each codec, of maps of unlike sides and of other values -> what is asked for.
EVERY_CODEC = {
    "cnn": [
        *(
            f"activations,grid=8,native={native},codec={c}"
            for native in ("true", "false")
            for c in ("f32", "f16", "u8", "u4")
        ),
        *(f"activations,grid=8,antialias=true,layers=4+1:2,codec={c}" for c in ("u8", "u4")),
        *(f"logits,codec={c}" for c in ("f32", "f16", "u8", "u4", "topk2")),
    ],
    "vit": [
        *(f"class_row,codec={c}" for c in ("f32", "u8", "u4", "log8")),
        *(f"tokens,q,codec={c}" for c in ("f16", "u8", "u4")),
    ],
}


def test_the_page_s_reader_gives_the_values_of_every_codec_with_zarr_and_numpy_alone(world, tmp_path):
    _, reader = python_blocks("docs/store-format.md")
    assert set(re.findall(r"^import (.*)$", reader, re.MULTILINE)) == {"json", "pathlib", "numpy as np", "zarr"}
    names: dict[str, Any] = {}
    exec(reader, names)
    store = Store.create(tmp_path / "S")
    codecs = set()
    for kind, targets in EVERY_CODEC.items():
        made = run_precompute(store, world.shards[:1], teacher_of(world.weights, kind), targets, store_views=True)
        for id in made["targets"]:
            manifest = store.target(id)
            codecs.add((manifest.identity.codec, manifest.identity.native))
            expected = store.array(id).compute()
            tasks = sorted(task for task in store.done() if task.id == id)
            found = np.concatenate([names["read_target"](store.url, task.name) for task in tasks])
            assert found.shape == (150 * len(tasks), *manifest.sample_shape)
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max(), err_msg=id)
    assert {name for name, _ in codecs} == {"raw", "f32", "f16", "u8", "u4", "log8", "topk2"}
    assert {name for name, native in codecs if native} == {"f32", "f16", "u8", "u4"}


def lines_of(heading: str) -> list[str]:
    """The commands in the first block below a heading of the README."""
    text = (ROOT / "README.md").read_text().partition(f"## {heading}\n")[2]
    return [line.partition("  #")[0].strip() for line in text.split("```")[1].strip().splitlines()]


# Runs command lines one after another; says status and stderr of each as JSON, in the last line.
IN_TURN = """
import contextlib, io, json, shlex, sys
from pipeline.cli import main
if __name__ == "__main__":
    found = []
    for line in sys.argv[1:]:
        name, *words = shlex.split(line)
        assert name == "pipeline"
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            try:
                main(words)
            except SystemExit as ended:
                found.append((ended.code, said.getvalue()))
    print(json.dumps(found))
"""


def in_timms_cache(folder: Path, name: str, weights: Path) -> None:
    """Put a file where timm finds the hub's weights of a name offline."""
    place = folder / f"models--timm--{name}"
    for part, content in (("refs/main", b"1"), ("snapshots/1/model.safetensors", weights.read_bytes())):
        (place / part).parent.mkdir(parents=True)
        (place / part).write_bytes(content)


@pytest.mark.slow
def test_the_lines_from_a_folder_to_a_student_run_as_they_stand(shared, tmp_path):
    """On class folders of real images; with fewer views and epochs than `init` wrote into the project file."""
    images = shared / "data" / "cifar10-test-000000.tar"
    for i, sample in enumerate(read_samples(str(images), build_index(str(images)), range(200))):
        (tmp_path / "photos" / f"class {sample.label}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / f"class {sample.label}" / f"{i}.png").write_bytes(sample.image)
    weights = shared / "weights" / "vit_tiny_patch16_224.safetensors"
    in_timms_cache(tmp_path / "hub", "vit_tiny_patch16_224.augreg_in21k_ft_in1k", weights)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
    }

    def said(*lines: str) -> list[tuple[int, str]]:
        """Status and stderr of each line, one process for all: importing torch eleven times takes a minute."""
        ran = subprocess.run(
            [sys.executable, "-c", IN_TURN, *lines], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stderr
        return [(status, text) for status, text in json.loads(ran.stdout.splitlines()[-1])]

    ((status, hint),) = said("pipeline train --recipe scratch --shards photos --out run --no-project")
    assert status == 1
    assert "photos is a folder of 200 images; shards are tar files\n  Pack it first:\n" in hint
    lines = lines_of("From a folder to a student")
    assert len(lines) == 10
    (first,) = said(lines[0])
    assert first[0] == 0, first
    project = tmp_path / "pipeline.yaml"
    fewer = re.sub(r"count: \d+", "count: 1", project.read_text())
    project.write_text(re.sub(r"optim.epochs: \d+", "optim.epochs: 2", fewer))
    for line, (status, text) in zip(lines[1:], said(*lines[1:]), strict=True):
        assert status == 0, (line, text)
    assert (tmp_path / "taught" / "student.onnx").is_file()


# Maps of 14 a side or more, and of 7: those of MobileNetV2 and of EfficientNet-B3.
MAPS = [("u8", (232, 480)), ("u8", (336, 616)), ("u4", (336, 616))]


def native(large: int, small: int) -> NativeMaps:
    return NativeMaps(grid=14, stages=((large, 14), (small, 7)), matrices=())


def test_what_a_store_costs_is_what_the_codecs_say():
    """The table's figures: bytes of a view image, and of ImageNet-1k in four views."""
    grid, tokens = (14, 14), 14 * 14 + 1
    codecs = [
        Codec("topk20", (1000,), 1),
        Codec("f16", (384,), 1),
        Codec("log8", (12, 6, tokens), 1),
        Codec("u8", (1, tokens, 384), 1),
        *(Codec(name, (sum(maps), *grid), 2, native=native(*maps)) for name, maps in MAPS),
        Codec("log8", (1, 6, tokens, tokens), 1),
    ]
    view, pixels = 8 * len(COLUMNS) + 4, 3 * 224**2
    each = [view, *(codec.sample_bytes for codec in codecs), pixels]
    text = (ROOT / "README.md").read_text().partition("## What a store costs\n")[2]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")][2:]
    assert [row[2] for row in rows] == [f"{n} B" if n < 1024 else f"{n / 1024:.1f} KiB" for n in each]
    assert [row[3] for row in rows] == [f"{n * 4 * 1_281_167 / 2**30:,.1f} GiB" for n in each]


def test_every_relative_link_and_every_file_that_is_named_exists():
    written = (
        "student/losses/relational.py",
        "tests/student/losses/test_relational.py",
    )  # by readers of adding-a-method.md
    pages = [str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")]
    for name in ("README.md", "CONTRIBUTING.md", *pages):
        text = (ROOT / name).read_text()
        links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
        files = re.findall(r"`((?:tests|docs|student|storage|precompute|pipeline)/[\w/]+\.(?:py|md))`", text)
        for path in [*((ROOT / name).parent / link for link in links), *(ROOT / f for f in files if f not in written)]:
            assert path.exists(), (name, path)


def test_hooks_take_the_linter_of_the_constraints():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (ruff,) = [repo["rev"] for repo in hooks if repo["repo"].endswith("/ruff-pre-commit")]
    assert f"ruff=={ruff.removeprefix('v')}" in (ROOT / "constraints.txt").read_text().splitlines()
