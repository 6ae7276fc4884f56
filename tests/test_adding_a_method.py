"""The page on adding a method adds one: its file, lines, recipe and test are taken from there and used as they are."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.conftest import HANGS, ROOT, World

if TYPE_CHECKING:
    from pathlib import Path

PAGE = (ROOT / "docs" / "adding-a-method.md").read_text()

# The new file and the registry with its lines come before this checkout's, which stays as it is.
BEFORE = """
import sys
import student.losses
student.losses.__path__.insert(0, sys.argv[1])
"""


@pytest.fixture(scope="module")
def method(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("method")
    file, lines, test = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (recipe,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert len([line for line in (file + lines + recipe).splitlines() if line.strip()]) < 70
    imported, entry = lines.splitlines(keepends=True)
    registry = (ROOT / "student" / "losses" / "registry.py").read_text()
    before, table, after = registry.partition("\nLOSSES: dict[str, type[Loss[Any]]] = {\n")
    assert table
    (folder / "losses").mkdir()
    for name, content in (
        ("losses/relational.py", file),
        ("losses/registry.py", before + imported + table + entry + after),
        ("relational.yaml", recipe),
        ("test_relational.py", test),
    ):
        (folder / name).write_text(content)
    return folder


def run(method: Path, code: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", BEFORE + code, str(method / "losses"), *words],
        cwd=method,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr


@pytest.mark.slow
def test_its_test_passes(method: Path) -> None:
    run(method, "import pytest\nsys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', 'test_relational.py']))")


@pytest.mark.slow
def test_its_recipe_trains_on_a_store(method: Path, world: World, tmp_path: Path) -> None:
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3}
    words = ["train", "--recipe", str(method / "relational.yaml"), "--store", str(world.store)]
    words += ["--val", world.shards[0], "--out", str(tmp_path / "run"), "--smoke", "--set", "stream.batch_size=32"]
    words += [part for shard in world.shards for part in ("--shards", shard)]
    words += [part for name, value in sizes.items() for part in ("--set", f"student.{name}={value}")]
    said = run(method, "from pipeline.cli import main\nmain(sys.argv[2:])", *words)
    assert "distances of class tokens" in said
    assert "relational" in said


def test_every_loss_is_registered_under_the_type_of_its_settings() -> None:
    from student.losses.registry import LOSSES

    assert {name: loss.Config.model_fields["type"].default for name, loss in LOSSES.items()} == {n: n for n in LOSSES}
