"""What README and docs show is run as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml

from storage.store import Store
from tests.conftest import World, run_precompute, teacher_of

ROOT = Path(__file__).parents[2]


def python_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


def prepare(world: World, folder: Path) -> None:
    """`train-000000.tar`, `train-000001.tar` and a store `S` with one target."""
    from storage.pack import pack

    pack(world.shards, str(folder / "train-{000000..000001}.tar"))
    shards = [str(folder / f"train-{n:06d}.tar") for n in range(2)]
    run_precompute(folder / "S", shards, teacher_of(world.weights, "cnn"), ["activations,grid=8"])


def test_the_loop_in_the_readme_is_15_lines_and_runs(world, tmp_path):
    (loop,) = python_blocks("README.md")
    assert len([line for line in loop.splitlines() if line.strip()]) == 15
    prepare(world, tmp_path)
    (tmp_path / "loop.py").write_text(loop + '    print("seen", *seen.shape, batch.images.dtype)\n')
    run = subprocess.run(
        [sys.executable, "loop.py"], cwd=tmp_path, env={**__import__("os").environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["seen", "32", "60", "8", "8", "torch.uint8"]


def test_the_reader_in_the_docs_needs_the_standard_library_and_numpy_alone(world, tmp_path, monkeypatch):
    (reader,) = python_blocks("docs/store-format.md")
    imported = set(re.findall(r"^import (.*)$", reader, re.MULTILINE))
    assert imported == {"base64, json, pathlib", "numpy as np"}
    (tmp_path / "S").symlink_to(world.store)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(reader, names)
    store = Store.open(world.store)
    marker = names["marker"]
    task = next(t for t in store.done() if t.name == names["path"].name)
    assert marker["id"] == task.id
    expected = store.marker(task).arrays["data"].read(0, len(names["values"]))
    assert np.array_equal(names["values"], expected)


def test_every_relative_link_and_every_file_that_is_named_exists():
    for name in ("README.md", "CONTRIBUTING.md", "docs/store-format.md", "docs/papers.md"):
        text = (ROOT / name).read_text()
        links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
        files = re.findall(r"`((?:tests|docs|student|storage|precompute|pipeline)/[\w/]+\.(?:py|md))`", text)
        for path in [*((ROOT / name).parent / link for link in links), *(ROOT / f for f in files)]:
            assert path.exists(), (name, path)


def test_hooks_take_the_linter_of_the_constraints():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (ruff,) = [repo["rev"] for repo in hooks if repo["repo"].endswith("/ruff-pre-commit")]
    assert f"ruff=={ruff.removeprefix('v')}" in (ROOT / "constraints.txt").read_text().splitlines()
