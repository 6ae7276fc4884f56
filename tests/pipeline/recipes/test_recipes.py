"""Every recipe goes through its first steps on a store with two tiny teachers, by the command line."""

from __future__ import annotations

import json
import re
import shlex
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from click.testing import CliRunner
from safetensors.torch import save_file

from pipeline.cli import cli, main
from pipeline.recipes import loader
from storage.store.store import Store
from storage.views.policy import policy
from student import settings as config
from student.losses.registry import LOSSES
from student.recipe import schema, validate
from student.settings import AttentionCopyConfig, LinksConfig, Schedule
from tests.conftest import ROOT, World, run_precompute, teacher_of

if TYPE_CHECKING:
    from pathlib import Path

    from pydantic import BaseModel

SMALL = {
    "student.img_size": 32,
    "student.patch_size": 4,
    "student.embed_dim": 48,
    "student.depth": 2,
    "student.num_heads": 3,
    "stream.batch_size": 32,
    "precision.amp_dtype": "none",
    "precision.fused_attn": True,
}
MATCH = {"layers": "uniform", "heads": "mean", "grid": "bicubic"}


@pytest.fixture(scope="module")
def full(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    """A store with all that the recipes read, and teacher -> its targets."""
    place = tmp_path_factory.mktemp("recipes") / "store"
    wishes = {
        "cnn": ["activations,grid=8", "logits"],
        "vit": ["class_row", "attention,layers=1:3", "q,k,layers=1:3", "class_token", "tokens,layers=last"],
    }
    made = {
        kind: run_precompute(place, world.shards, teacher_of(world.weights, kind), several)["targets"]
        for kind, several in wishes.items()
    }
    evaluation = {"policy": policy("light", 32).evaluation, "num_views": 1, "new_bank": True}
    run_precompute(place, world.shards[:1], teacher_of(world.weights, "vit"), wishes["vit"], **evaluation)
    return place, made


def train(world: World, store: Path, out: Path, recipe: str, capsys: Any, *more: str, **settings: Any) -> Any:
    words = ["train", "--recipe", recipe, "--val", world.shards[0], "--store", str(store), "--out", str(out), "--json"]
    words += [part for shard in world.shards for part in ("--shards", shard)]
    for name, value in {**SMALL, **settings}.items():
        words += ["--set", f"{name}={value}"]
    with pytest.raises(SystemExit) as ended:
        main([*words, *more])
    said = capsys.readouterr()
    return ended.value.code, json.loads(said.out), said.err


def changes(recipe: str, folder: Path) -> dict[str, Any]:
    """What a recipe at the paper's scale needs for a small student."""
    if recipe == "attention-distill":
        return {f"losses.attention.{name}": value for name, value in MATCH.items()}
    if recipe == "head-specific":
        return {"losses.head_specific.layers": "uniform", "losses.head_specific.grid": "bicubic"}
    if recipe == "attention-copy":
        return {"attention_copy.layers": "last-2", "attention_copy.grid": "bicubic"}
    if recipe == "feature-mse":
        return {"losses.features.projection": "linear", "losses.features.grid": "bicubic"}
    if recipe == "advit-l1":
        return {"losses.advit.layers": "uniform", "losses.advit.grid": "bicubic"}
    if recipe == "fine-tune":
        import timm

        sizes = {name.partition(".")[2]: value for name, value in SMALL.items() if name.startswith("student.")}
        network = timm.create_model("vit_base_patch16_224.mae", num_classes=7, **sizes)
        save_file(network.state_dict(), folder / "base.safetensors")
        weights = folder / "base.safetensors"
        return {"student.pretrained": "false", "student.weights": weights, "stream.bank.policy": "light"}
    return {}


def test_small_variants_lie_over_their_recipes(tmp_path):
    """What a variant does not change is the recipe's; as a file it is the same, and says that it is small."""
    for name in loader.names():
        whole, small = loader.load_recipe(name), loader.load_recipe(f"{name}-small")
        assert {*small.losses} == {*whole.losses}
        assert (small.attention_copy is None) == (whole.attention_copy is None)
        assert small.stream.batch_size == 128 < whole.stream.batch_size or name == "head-specific"
        assert small.student.model == "vit_tiny_patch16_224"
        for variant in (name, f"{name}-small"):
            (tmp_path / "file.yaml").write_text(loader.text(variant))
            assert loader.load_recipe(str(tmp_path / "file.yaml")) == loader.load_recipe(variant)
        assert "# The small variant" in loader.text(f"{name}-small")
        assert "\nsmall:" not in loader.text(name)


@pytest.mark.parametrize("recipe", [name for each in loader.names() for name in (each, f"{each}-small")])
def test_a_recipe_goes_through_its_first_steps(world, full, tmp_path, capsys, recipe):
    store, _ = full
    name = recipe.removesuffix("-small")
    settings = changes(name, tmp_path) if recipe in loader.names() or name == "fine-tune" else {}
    code, result, said = train(world, store, tmp_path / "run", recipe, capsys, "--smoke", "--same-classes", **settings)
    assert code == 0, said
    assert result["smoke"] is True
    expected = {"aal": {"aal"}, "advit-l1": {"advit"}, "attention-distill": {"attention"}}
    expected |= {"deit-hard": {"deit"}, "deit-soft": {"deit"}, "head-specific": {"head_specific"}}
    expected |= {"attndistill": {"alignment", "guidance"}}
    expected |= {"simreg": {"alignment"}, "seed": {"seed"}, "compress": {"compress"}}
    expected |= {"attention-copy": {"attention_copy"}, "feature-mse": {"features"}}
    assert set(result["targets"]) == expected.get(name, set())


def test_two_teachers_teach_one_student(world, full, tmp_path, capsys):
    """AAL from the CNN and attention distillation from the ViT in one recipe, each with a schedule of its own."""
    store, targets = full
    recipe = tmp_path / "both.yaml"
    recipe.write_text(
        "losses:\n"
        "  crossentropy: {}\n"
        "  aal: {weight: {start: 100, decay: 0.5}, teacher: cnn}\n"
        "  attention: {weight: {start: 1, shape: cosine, end: 0, over: 2}, teacher: vit, layers: uniform, heads: mean,"
        " grid: bicubic}\n"
        "  far: {type: advit, weight: {start: 1, until: 1}, layers: [[2, 3]], grid: bicubic}\n"
        "optim: {epochs: 2, warmup_epochs: 0}\n"
    )
    code, result, said = train(world, store, tmp_path / "run", str(recipe), capsys)
    assert code == 0, said
    assert result["targets"] == {
        "aal": [targets["cnn"][0]],
        "attention": [targets["vit"][1]],
        "far": [targets["vit"][0]],
    }
    epochs = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    weights = [line["weights"] for line in epochs if "weights" in line]
    assert weights[0] == {"crossentropy": 1, "aal": 100, "attention": 1, "far": 1}
    assert weights[1] == {"crossentropy": 1, "aal": 50, "attention": 0.5, "far": 0}
    for words in ("layers 1-2, 2-3 (student-teacher)", "mean over heads", "4x4 to 8x8 (bicubic, mass kept)"):
        assert words in said


def test_q_and_k_serve_where_maps_are_not_stored(world, full, tmp_path, capsys):
    store, targets = full
    settings = {
        **changes("attention-distill", tmp_path),
        "losses.attention.target": f"[{', '.join(targets['vit'][2:4])}]",
    }
    code, result, said = train(world, store, tmp_path / "run", "attention-distill", capsys, "--smoke", **settings)
    assert code == 0, said
    assert result["targets"] == {"attention": targets["vit"][2:4]}
    assert "from q and k" in said


def test_contract_10_logits_of_unknown_classes_need_a_word(world, full, tmp_path, capsys):
    store, _ = full
    code, result, _ = train(world, store, tmp_path / "run", "deit-hard", capsys, "--smoke")
    assert code == 1
    assert "give --same-classes" in result["error"]


def test_contract_10_logits_of_other_classes_are_refused(world, tmp_path, capsys):
    """A teacher of five classes for a student of three."""
    import timm
    import torch

    from storage.testing import TINY_CNN

    torch.manual_seed(0)
    name, arguments = TINY_CNN
    save_file(timm.create_model(name, num_classes=5, **arguments).state_dict(), tmp_path / "five.safetensors")
    teacher = teacher_of({"cnn": str(tmp_path / "five.safetensors")}, "cnn", arguments={**arguments, "num_classes": 5})
    run_precompute(tmp_path / "store", world.shards, teacher, ["logits"], num_views=1)
    code, result, _ = train(world, tmp_path / "store", tmp_path / "run", "deit-soft", capsys, "--same-classes")
    assert code == 1
    assert "number of classes: the student has 3, the teacher 5" in result["error"]
    assert "fit-teacher" in result["error"]
    assert Store.open(tmp_path / "store").targets()


@pytest.mark.parametrize(
    ("recipe", "settings", "message"),
    [
        ("advit-l1", {}, "losses.advit.layers=uniform"),
        ("advit-l1", {"losses.advit.layers": "uniform"}, "losses.advit.grid=bicubic"),
        (
            "head-specific",
            {"losses.head_specific.layers": "uniform", "losses.head_specific.heads": "[[9, 1]]"},
            "lets the student's head 9 meet the teacher's head 1; the student has heads 1 to 3",
        ),
        ("head-specific", {"losses.head_specific.adaptive": "teacher-correct"}, "--target q,k,logits"),
        ("attention-distill", {}, "layers=first-18: the student has 2 layers, the teacher 3; at most first-2"),
        (
            "aal",
            {"losses.advit.teacher": "vitt", "losses.advit.layers": "last"},
            "losses.advit.teacher: asked for vit",
        ),
        ("aal", {"losses.deit.distillation_type": "hrad"}, "losses.deit.distillation_type: should be 'hard'"),
        ("aal", {"losses.aal.weight.until": -1}, "losses.aal.weight.until"),
    ],
)
def test_what_does_not_fit_is_one_clear_message(world, full, tmp_path, capsys, recipe, settings, message):
    store, _ = full
    code, result, _ = train(world, store, tmp_path / "run", recipe, capsys, "--smoke", **settings)
    assert code == 1
    assert message in result["error"]


def test_the_rows_of_aal_s_tables_are_settings_that_a_recipe_takes():
    text = (ROOT / "docs" / "papers.md").read_text()
    rows = re.findall(r"`(--set [^`]+)`", text.partition("### Its tables, as commands")[2].partition("\n## ")[0])
    assert len(rows) > 20
    for row in rows:
        settings = [word for word in shlex.split(row) if word != "--set"]
        made = loader.load_recipe("aal", settings)
        assert ("aal" in made.losses) != ("losses.aal=null" in settings)
        assert timm_has(made.student.model)
    fixed = loader.load_recipe("aal", ["losses.aal.weight.then={}"]).losses["aal"].weight
    assert fixed.at(300) == pytest.approx(2000 * 0.99**300)


def timm_has(model: str) -> bool:
    import timm

    return bool(timm.is_model(model))


def test_the_documentation_names_every_setting_and_its_example_is_a_recipe():
    text = (ROOT / "docs" / "recipes.md").read_text()
    example = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert set(validate.validate(example, "docs").losses) == {"crossentropy", "aal", "attention", "second"}
    models: list[type[BaseModel]] = [
        schema.Recipe,
        config.StudentConfig,
        Schedule,
        schema.OptimConfig,
        config.BankChoice,
        schema.StreamConfig,
        schema.ControlConfig,
        schema.PrecisionConfig,
        LinksConfig,
        AttentionCopyConfig,
        *(loss.Config for loss in LOSSES.values()),
    ]
    words = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    said = set(re.findall(r"\w+", " ".join(words)))
    assert not {name for model in models for name in model.model_fields} - said
    assert all(f"`{name}`" in text for name in LOSSES)
    helped = CliRunner().invoke(cli, ["train", "--help"]).output
    assert all(re.search(rf"\b{name}\b", helped) for name in loader.names())


@pytest.mark.parametrize(
    ("model", "left_out"),
    [
        ("resnet18", {"num_heads", "depth", "embed_dim", "patch_size"}),
        ("torchvision/resnet18", {"num_heads", "depth", "embed_dim", "patch_size", "drop_path_rate"}),
        ("vit_small_patch16_dinov3", set()),
    ],
)
def test_sizes_that_a_network_named_over_a_recipe_does_not_take_are_left_out(
    model: str, left_out: set[str], capsys: Any
) -> None:
    recipe = loader.load_recipe("attndistill-small").student
    named = loader.load_recipe("attndistill-small", [f"student.model={model}"]).student
    sizes = {n for n in type(recipe).model_fields if n != "model" and getattr(recipe, n) != getattr(named, n)}
    assert sizes == {name for name in left_out if getattr(recipe, name) is not None}
    assert all(getattr(named, name) is None for name in sizes)
    assert ("does not take what the recipe says of" in capsys.readouterr().err) == bool(sizes)


def test_a_size_that_the_user_says_is_kept_where_a_network_does_not_take_it() -> None:
    named = loader.load_recipe("attndistill-small", ["student.model=resnet18", "student.depth=3"]).student
    assert named.depth == 3
