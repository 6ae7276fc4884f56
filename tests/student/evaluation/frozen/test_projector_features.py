"""Features from inside the projector: what training computed, layer by layer, and files that are no projector."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from precompute.taps import prefix_roles
from storage.errors import UserError
from storage.shards.shard import open_shards
from student.alignment.student_taps import StudentTaps
from student.evaluation.frozen.features import features_of
from student.evaluation.frozen.knn import knn_ranks
from student.evaluation.frozen.projector_features import projector_layers, projector_reading
from student.losses import projector_alignment
from student.losses.parts.projector import projector
from student.models.files import load_student
from tests.student.attention_copy.copying import asked
from tests.student.runs import run

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import World

WIDTH, THEIRS = 48, 48


@pytest.fixture(scope="module")
def trained(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("inside") / "run"
    run(world, out, "simreg", "optim.epochs=1", val=[])
    return out


def kept(folder: Path, settings: projector_alignment.ProjectorAlignmentConfig) -> tuple[torch.nn.Sequential, Path]:
    """A projector with numbers of its own, and a student's file beside what was kept of it."""
    torch.manual_seed(0)
    made = projector(6, 9, settings)
    assert isinstance(made, torch.nn.Sequential)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter))
    save_file({f"it.token.projector.{n}": t for n, t in made.state_dict().items()}, folder / "losses.safetensors")
    return made, folder / "last.safetensors"


@pytest.mark.parametrize("kind", ["mlp", "linear"])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_features_after_n_maps_are_those_of_the_projector_itself(tmp_path, kind, depth):
    made, student = kept(tmp_path, projector_alignment.ProjectorAlignmentConfig(projector=kind, depth=depth))
    x = torch.randn(5, 6)
    whole = made(x)
    assert torch.equal(projector_layers(student, depth)(x), whole)
    for n in range(1, depth):
        found = projector_layers(student, n)
        rest = made[len(found) :]
        assert isinstance(rest[0], torch.nn.Linear), "a GELU comes with the map before it"
        assert sum(isinstance(m, torch.nn.Linear) for m in found) == n
        assert torch.equal(rest(found(x)), whole)
    with pytest.raises(UserError, match=rf"has {depth} linear map\(s\)"):
        projector_layers(student, depth + 1)


def test_k_nn_and_probe_through_the_command(world, trained, capsys):
    words = [trained, "--shards", world.shards[1], "--train-shards", world.shards[0], "--device", "cpu"]
    found = {n: asked(capsys, "evaluate", "knn", *words, "--projector-layers", n) for n in range(5)}
    assert found[0] == asked(capsys, "evaluate", "knn", *words)
    assert [found[n]["width"] for n in range(5)] == [WIDTH, 2 * WIDTH, WIDTH, 2 * WIDTH, THEIRS]
    model, about = load_student(trained / "last.safetensors")
    through = projector_layers(trained / "last.safetensors", 3)

    def class_token(network: Any, pixels: torch.Tensor) -> Any:
        return through(network.forward_features(pixels)[:, 0])

    bank, others = (features_of(model, about, open_shards(url), class_token) for url in world.shards)
    right = 100 * float((knn_ranks(bank, others, [20], 3)[20] == 0).float().mean())
    assert found[3]["knn"]["20"]["top1"] == pytest.approx(right, abs=0.01)
    probed = asked(capsys, "evaluate", "linear-probe", *words, "--projector-layers", 1, "--lr", 0.01)
    assert "1 of the projector's linear maps" in probed["features"]
    shutil.copy(trained / "last.safetensors", trained / "best.safetensors")
    best = asked(capsys, "evaluate", "knn", trained / "best.safetensors", *words[1:], "--projector-layers", 1, status=1)
    assert "that of the last student" in best["error"]
    assert "has 4 linear map(s)" in asked(capsys, "evaluate", "knn", *words, "--projector-layers", 5, status=1)["error"]


def test_the_class_token_is_projected_whatever_is_pooled(world, tmp_path):
    """What training gave the projector, for a student whose other features are the mean of its patches."""
    run(world, tmp_path / "run", "simreg", "optim.epochs=1", "student.global_pool=avg", val=[])
    model, _ = load_student(tmp_path / "run" / "last.safetensors")
    seen = StudentTaps(model, {"tokens"})
    read, text = projector_reading(tmp_path / "run" / "last.safetensors", model, 4)
    pixels = torch.randn(3, 3, 32, 32)
    found = read(model, pixels)
    assert text.startswith("class token")
    token = seen.tokens[:, prefix_roles(model).index("class")]
    assert torch.equal(found, projector_layers(tmp_path / "run" / "last.safetensors", 4)(token))


def _none(state: dict[str, torch.Tensor]) -> None:
    state.clear()
    state["links"] = torch.zeros(1)


def _two(state: dict[str, torch.Tensor]) -> None:
    state |= {name.replace("it.", "other."): t.clone() for name, t in state.items()}


def _other_width(state: dict[str, torch.Tensor]) -> None:
    state["it.token.projector.3.weight"] = torch.zeros(6, 7)


def _no_numbers(state: dict[str, torch.Tensor]) -> None:
    state["it.token.projector.3.bias"][0] = float("nan")


def _hole(state: dict[str, torch.Tensor]) -> None:
    del state["it.token.projector.0.weight"], state["it.token.projector.0.bias"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_none, "trained without a projector"),
        (_two, "projectors of it.token, other.token"),
        (_other_width, "not one that `train` writes"),
        (_no_numbers, "not finite"),
        (_hole, "0.weight"),
        (None, "cannot be read"),
    ],
)
def test_what_is_no_projector_is_refused(tmp_path, change: Any, said: str):
    _, student = kept(tmp_path, projector_alignment.ProjectorAlignmentConfig())
    path = tmp_path / "losses.safetensors"
    if change is None:
        path.write_bytes(b"hostile" * 9)
    else:
        state = load_file(path)
        change(state)
        save_file(state, path)
    with pytest.raises(UserError, match=said):
        projector_layers(student, 1)


def test_a_run_without_a_projector_says_so(trained, tmp_path):
    shutil.copy(trained / "last.safetensors", tmp_path)
    with pytest.raises(UserError, match=r"^`projector_layers=\d`: .* was trained without a projector"):
        projector_layers(tmp_path / "last.safetensors", 1)
