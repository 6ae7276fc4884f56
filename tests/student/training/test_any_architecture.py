"""Students without tokens: what learns from embeddings, logits and maps, by the command line, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from pipeline.cli import main
from pipeline.recipes import loader
from storage.errors import UserError
from storage.store.store import Store
from student.evaluation.frozen.projector_features import projector_reading
from student.models.build import build_student
from student.models.files import load_student
from student.training.distiller import find_targets, student_taps_of
from tests.conftest import World, run_precompute, teacher_of
from tests.student.attention_copy.copying import asked
from tests.student.runs import command, log, run, same
from tests.student.training.test_resume import Cut, cut_after

if TYPE_CHECKING:
    from pathlib import Path

CNN = ["student.model=test_resnet", *(f"student.{name}=null" for name in ("patch_size", "embed_dim", "depth"))]
CNN += ["student.num_heads=null", "optim.epochs=2"]


def unlabeled(words: list[str]) -> list[str]:
    """The words of a run that is given no validation shards."""
    at = words.index("--val")
    return words[:at] + words[at + 2 :]


@pytest.mark.parametrize("recipe", ["simreg", "seed", "compress"])
def test_a_cnn_learns_from_stored_embeddings_without_labels(
    world: World, tmp_path: Path, capsys: Any, monkeypatch: Any, recipe: str
) -> None:
    queue = [] if recipe == "simreg" else [f"losses.{recipe}.queue=128"]
    settings = [*CNN, *queue, "checkpoint_interval=3"]
    with pytest.raises(SystemExit):
        main(unlabeled(command(world, tmp_path / "run", recipe, *settings)))
    said = capsys.readouterr()
    assert "pooled features, 96 wide" in said.err, said
    with monkeypatch.context() as patched:
        cut_after(patched, 5)
        with pytest.raises(Cut):
            run(world, tmp_path / "cut", recipe, *settings, val=())
    asked(capsys, *unlabeled(command(world, tmp_path / "cut", recipe, *settings)), "--resume")
    assert same(tmp_path / "run", tmp_path / "cut")
    first, last = [line["losses"] for line in log(tmp_path / "run") if "step" not in line]
    (name,) = first
    if recipe == "simreg":  # the others' losses grow with their queues
        assert last[name] < first[name]
    student = tmp_path / "run" / "last.safetensors"
    bare = timm.create_model("test_resnet", num_classes=0)
    bare.load_state_dict(load_file(student))
    model, about = load_student(student)
    pixels = torch.randn(2, 3, 32, 32)
    assert not about.classifies
    assert torch.equal(bare.eval()(pixels), model(pixels))

    given = [tmp_path / "run", "--shards", world.shards[0], "--train-shards", world.shards[1], "--device", "cpu"]
    knn = asked(capsys, "evaluate", "knn", *given)
    assert (knn["samples"], knn["width"], knn["features"]) == (150, 96, "pooled features, as the classifier reads them")
    assert knn["knn"]["10"]["top1"] > 50, "three classes"
    if recipe != "simreg":  # all three leave a student of one kind
        return
    assert asked(capsys, "export", tmp_path / "run", "--shards", world.shards[0], "--out", tmp_path / "s.onnx")[
        "checked"
    ]
    assert asked(capsys, "evaluate", "linear-probe", *given, "--lr", 0.1)["width"] == 96
    inside = asked(capsys, "evaluate", "knn", *given, "--projector-layers", 1)
    assert (inside["width"], inside["features"]) == (192, "pooled features, through 1 of the projector's linear maps")
    tuned = [*CNN, f"student.weights={student}", "student.pretrained=false", "optim.epochs=1"]
    words = command(world, tmp_path / "tuned", "fine-tune", *tuned)
    at = words.index("--store")
    asked(capsys, *words[:at], *words[at + 2 :])
    scored = asked(capsys, "evaluate", "accuracy", tmp_path / "tuned", "--shards", world.shards[0])
    assert scored["samples"] == 150
    Image.new("RGB", (32, 32)).save(tmp_path / "x.png")
    assert asked(capsys, "predict", tmp_path / "tuned", tmp_path / "x.png")


def test_the_projector_is_evaluated_on_what_it_was_trained_on(world: World, tmp_path: Path) -> None:
    """MobileNetV3's classifier reads more features than its last map has."""
    settings = [*CNN, "student.model=mobilenetv3_small_050", "optim.epochs=1"]
    run(world, tmp_path / "run", "simreg", *settings, val=())
    student, _ = load_student(tmp_path / "run" / "last.safetensors")
    read, _ = projector_reading(tmp_path / "run" / "last.safetensors", student, 4)
    pixels = torch.randn(2, 3, 32, 32)
    features = student(pixels)
    assert features.shape[1] != student.num_features
    whole = load_file(tmp_path / "run" / "losses.safetensors")
    assert whole["alignment.token.projector.0.weight"].shape == features.shape[1:]
    assert read(student, pixels).shape == (2, 48)


def test_a_vit_without_a_class_token_learns_by_its_mean(world: World, tmp_path: Path) -> None:
    gap = ["student.model=vit_base_patch16_gap_224", "optim.epochs=1"]
    assert run(world, tmp_path / "run", "simreg", *gap, val=())["epochs"] == 1
    model, _ = load_student(tmp_path / "run" / "last.safetensors")
    assert model.num_prefix_tokens == 0


def test_embeddings_are_learned_beside_labels(world: World, tmp_path: Path) -> None:
    """With a classifier, the pooled features are what it reads."""
    both = [*CNN, "losses.crossentropy={weight: 1}", "optim.epochs=1"]
    result = run(world, tmp_path / "run", "simreg", *both)
    assert result["samples"] == 300
    epoch = [line["losses"] for line in log(tmp_path / "run") if "step" not in line][-1]
    assert epoch.keys() == {"alignment", "crossentropy"}


@pytest.fixture(scope="module")
def patches(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the world's store that also has the ViT's patch tokens after the last block."""
    place = world.copy(tmp_path_factory.mktemp("patches") / "store")
    run_precompute(Store.open(place), world.shards, teacher_of(world.weights, "vit"), ["tokens,layers=last"])
    return place


def test_maps_of_a_cnn_learn_from_patch_tokens_and_from_maps(world: World, patches: Path, tmp_path, capsys) -> None:
    settings = [*CNN, "model_ema_decay=null", "losses.features.weight=0.1", "losses.features.projection=linear"]
    words = command(world, tmp_path / "tokens", "feature-mse", *settings, "losses.features.grid=bicubic")
    words[words.index("--store") + 1] = str(patches)
    result = asked(capsys, *words)
    assert result["samples"] == 300
    losses = [line["losses"]["features"] for line in log(tmp_path / "tokens") if "step" not in line]
    assert losses[1] < losses[0]
    maps = ["losses.features.layers=[[2, 4]]", f"losses.features.target={world.targets['activations f32']}"]
    assert asked(capsys, *command(world, tmp_path / "maps", "feature-mse", *settings, *maps))["samples"] == 300
    losses = [line["losses"]["features"] for line in log(tmp_path / "maps") if "step" not in line]
    assert losses[1] < losses[0]


READ_ATTENTION = {"attention", "values"}


@pytest.mark.parametrize("name", loader.names())
def test_recipes_speak_of_attention_where_they_read_it_alone(name: str) -> None:
    student = [*CNN, "student.global_pool=null", "student.shifted_patches=false", "student.img_size=32"]
    student += ["student.mlp_ratio=null", "student.proj_drop_rate=null"]
    recipe = loader.load_recipe(name, student)
    model, _ = build_student(recipe.student, 3)
    reads = bool(student_taps_of(recipe) & READ_ATTENTION) or recipe.attention_copy is not None
    try:
        find_targets(None, [], recipe, model)
        said = ""
    except UserError as error:
        said = str(error)
    assert ("attention" in said.partition("\n")[0]) == reads, said
    if reads:
        assert said.startswith(next((n for n in (*recipe.losses, "attention_copy") if said.startswith(n)), "?")), said
        assert "learns by: alignment, compress, crossentropy, deit, features, seed" in said
    else:
        assert not said or "needs stored targets" in said
