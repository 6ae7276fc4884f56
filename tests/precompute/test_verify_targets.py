"""Verify against the live teacher: what a store holds is what the teacher says, or it is named."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from precompute.engine import dask_runner
from precompute.engine import session as sessions
from precompute.verify_targets import TOLERANCE, LiveTargets, differences
from storage.errors import IdentityError
from storage.objects import json_record
from storage.store.codecs import Codec
from storage.store.store import Store
from storage.store.verify import VerifyReport, verify
from storage.testing import TINY_CNN, synthetic_shards
from storage.views.policy import policy
from tests.conftest import World, run_precompute, teacher_of, write_teacher


def checked(store: Store, shards: list[str], samples: int = 20, weights: tuple[str, ...] = ()) -> VerifyReport:
    report = VerifyReport()
    return verify(store, shards, samples=samples, look=LiveTargets(store, report, weights), report=report)


def test_targets_of_all_taps_and_codecs_are_what_the_live_teacher_says(world: World) -> None:
    report = checked(Store.open(world.store), world.shards)
    assert not report.failures
    assert report.targets_compared == 7 * 2 * 2 * 10  # targets, shards, views, samples
    for kind in ("cnn", "vit"):
        assert report.compared_with[kind] == f"PyTorch teacher ({world.weights[kind]})"


def test_what_a_vit_gives_besides_is_what_the_live_teacher_says(world: World, tmp_path: Path) -> None:
    wishes = [
        "v,layers=last",
        "attention",
        "attention,layers=1,codec=log8",
        "tokens",
        "tokens,layers=1:2",
        "embedding",
        "tokens,layers=last,codec=u8",
    ]
    shards = synthetic_shards(tmp_path / "data", shards=1, samples=20)
    run_precompute(tmp_path / "store", shards, teacher_of(world.weights, "vit"), wishes, num_views=1)
    report = checked(Store.open(tmp_path / "store"), shards, samples=0)
    assert not report.failures
    assert report.targets_compared == len(wishes) * 20


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, world: World) -> tuple[Path, list[str]]:
    """A shard under `deit`, and a folder for stores of it."""
    folder = tmp_path_factory.mktemp("check")
    return folder, synthetic_shards(folder / "data", shards=1, samples=70)


WISHES = ["activations,grid=8,codec=f32", "activations,grid=8,codec=u8", "logits,codec=topk2"]


def made(world: World, one: tuple[Path, list[str]], place: Path, **changes: Any) -> Store:
    teacher = teacher_of({**world.weights, **changes}, "cnn")
    run_precompute(place, one[1], teacher, WISHES, policy=policy("deit", 32), num_views=2, store_views=True)
    return Store.open(place)


def test_mixed_views_and_their_pixels_are_compared_too(world: World, one: Any, tmp_path: Path) -> None:
    report = checked(made(world, one, tmp_path / "store"), one[1], samples=0)
    assert not report.failures
    assert report.targets_compared == 4 * 2 * 70
    assert report.compared_with["views"] == "view images rendered again"


def test_one_sample_that_the_teacher_says_otherwise_is_listed_by_shard_key_and_view(
    world: World, one: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All checksums are right: the session gave other values when the store was made."""

    class Wrong:
        def __init__(self, session: sessions.Session) -> None:
            self.session, self.settings, self.calls = session, session.settings, 0

        def run(self, images: np.ndarray) -> list[np.ndarray]:
            outputs = self.session.run(images)
            self.calls += 1
            if self.calls == 2:  # the first block's second view
                outputs[0][5] *= 1.05
            return outputs

    real = sessions.open_session
    monkeypatch.setattr(dask_runner, "open_session", lambda *args: Wrong(real(*args)))
    store = made(world, one, tmp_path / "store")
    assert not verify(store).failures
    report = checked(store, one[1], samples=0)
    assert len(report.failures) == 2, "the activations in f32 and in u8, not the logits"
    for failure in report.failures:
        assert f"{one[1][0]}, key shard-000000-00005, view 1, target cnn-activations" in failure
        assert "differs from the PyTorch teacher" in failure


def test_without_the_weights_the_stored_graph_is_asked_and_it_is_said(world: World, one: Any, tmp_path: Path) -> None:
    weights = str(shutil.copy(world.weights["cnn"], tmp_path / "moved.safetensors"))
    store = made(world, one, tmp_path / "store", cnn=weights)
    Path(weights).unlink()
    report = checked(store, one[1])
    assert not report.failures
    assert report.compared_with["cnn"] == f"stored graph ({weights} not found: `weights=F`)"
    report = checked(store, one[1], weights=(world.weights["cnn"],))
    assert not report.failures
    assert report.compared_with["cnn"] == f"PyTorch teacher ({world.weights['cnn']})"


def test_contract_5_other_weights_than_the_recorded_are_refused(world: World, tmp_path: Path) -> None:
    other = write_teacher(tmp_path / "other.safetensors", TINY_CNN, seed=9)
    with pytest.raises(IdentityError, match=r"sha256: expected .* or .*, found"):
        LiveTargets(Store.open(world.store), VerifyReport(), (other,))


def test_a_matrix_that_resizes_otherwise_than_the_target_s_identity_says_is_found(world: World, tmp_path: Path) -> None:
    store = world.copy(tmp_path / "store")
    path = store / "targets" / world.targets["activations u8"] / "manifest.json"
    content = json_record.from_json(path.read_bytes(), "manifest")
    side, matrix = next(iter(content["resize"].items()))
    content["resize"][side] = [[1.0, *[0.0] * (len(row) - 1)] for row in matrix]
    path.write_bytes(json_record.to_json(content))  # with a digest of its own
    report = checked(Store.open(store), world.shards, weights=(world.weights["cnn"],))
    assert any(f"manifest.json: resize.{side}: it is not the matrix" in failure for failure in report.failures)


@pytest.mark.parametrize("codec", ["f32", "f16", "u8", "u4", "log8", "topk5"])
def test_the_tolerance_allows_what_the_codec_rounds_and_little_more(codec: str) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(200, 10)).astype(np.float32) * 4
    rows = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    values = rows if codec == "log8" else logits
    kept = Codec(codec, (10,), 1, axes=("class",), values={"log8": "rows", "topk5": "logits"}.get(codec, "plain"))  # type: ignore[arg-type]
    allowed = TOLERANCE[codec.rstrip("5") if codec == "topk5" else codec]
    assert (differences(kept, kept.encode(values), values) <= allowed).all()
    assert (differences(kept, kept.encode(values), np.roll(values, 1, 0)) > allowed).mean() > 0.95
