"""A store and runs that were made before the code was laid out anew are read, checked and resumed as before."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.cli import main
from storage.store.store import Store
from tests.conftest import HANGS, ROOT

CNN = [
    "--teacher",
    "resnet10t",
    "--teacher-name",
    "cnn",
    "--weights",
    "cnn.safetensors",
    "--teacher-arg",
    "channels=[8,12,16,24]",
    "--teacher-arg",
    "stem_width=8",
    "--teacher-arg",
    "num_classes=3",
    "--input-size",
    "64",
    "--mean",
    "0.5",
    "--std",
    "0.5",
    "--view-policy",
    "light",
    "--view-size",
    "32",
    "--num-views",
    "2",
    "--target",
    "activations,grid=8,codec=u8",
    "--target",
    "logits,codec=topk2",
]
RUN = [
    "--recipe",
    "aal",
    "--val",
    "shard-000000.tar",
    "--out",
    "cut",
    "--resume",
    "--set",
    "checkpoint_interval=1",
    "--set",
    "student.model=vit_tiny_patch16_224",
    "--set",
    "student.img_size=32",
    "--set",
    "student.patch_size=4",
    "--set",
    "student.embed_dim=12",
    "--set",
    "student.depth=1",
    "--set",
    "student.num_heads=2",
    "--set",
    "stream.batch_size=8",
    "--set",
    "optim.epochs=2",
    "--set",
    "optim.warmup_epochs=0",
    "--set",
    "model_ema_decay=0.9",
]
STORE = ["--shards", "shard-000000.tar", "--store", "store"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(ROOT / "tests" / "data" / "made_before_layout.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "made_before_layout"


def answer(made: Path, *words: str) -> dict[str, Any]:
    """What a command gives as JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *words, "--json"],
        cwd=made,
        capture_output=True,
        text=True,
        timeout=HANGS,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_every_object_of_the_store_is_whole(made: Path) -> None:
    found = answer(made, "verify", *STORE)
    assert found["failures"] == []
    assert found["targets_compared"]


def test_its_targets_are_those_that_the_same_command_asks_for(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in sorted((made / "store").rglob("*")) if path.is_file()}
    monkeypatch.chdir(made)
    with pytest.raises(SystemExit) as ended:
        main(["precompute", *CNN, *STORE, "--json"])
    said = capsys.readouterr()
    assert ended.value.code == 0, said.err
    assert json.loads(said.out)["written"] == 0
    assert {path: path.read_bytes() for path in sorted((made / "store").rglob("*")) if path.is_file()} == before


def test_a_target_that_was_begun_with_resized_maps_is_completed_with_them(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The words do not say `native`: what the store has counts, for `plan` as well."""
    folder = Path(shutil.copytree(made, tmp_path / "begun"))
    store = Store.open(folder / "store")
    (id,) = (id for id in store.targets() if "activations" in id)
    undisturbed = store.array(id).compute()
    (task,) = (task for task in store.done() if (task.id, task.view) == (id, 1))
    (folder / "store" / "done" / task.name).unlink()
    shutil.rmtree(folder / "store" / task.folder)
    monkeypatch.chdir(folder)
    answers = []
    for words in (["plan", "--measure", "0"], ["precompute"]):
        with pytest.raises(SystemExit) as ended:
            main([*words, *CNN, *STORE, "--json"])
        said = capsys.readouterr()
        assert ended.value.code == 0, said.err
        answers.append(json.loads(said.out))
    planned, result = answers
    assert id in [target["target"] for target in planned["targets"]]
    assert planned["missing"]["view_images"] == store.index(store.shard_ids()[0]).summary.samples
    assert result["written"] == 1
    assert {*store.targets()} == {*Store.open(made / "store").targets()}
    again = Store.open(folder / "store").array(id).compute()
    assert again.shape == undisturbed.shape
    assert abs(again - undisturbed).max() <= 1e-2 * abs(undisturbed).max()  # of other processors' sessions


@pytest.mark.slow
def test_its_student_has_the_accuracy_that_it_had(made: Path) -> None:
    then = json.loads((made / "whole" / "result.json").read_text())
    assert answer(made, "evaluate", "accuracy", "whole", "--shards", "shard-000000.tar")["top1"] == then["top1"]


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_weights_of_the_other(made: Path) -> None:
    answer(made, "train", *RUN, *STORE)
    for name in ("last", "ema", "losses"):
        ours, theirs = (load_file(made / run / f"{name}.safetensors") for run in ("cut", "whole"))
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[key], theirs[key], atol=1e-5) for key in ours), name
