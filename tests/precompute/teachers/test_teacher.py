"""Teachers: names, weights and what identifies them; a file that is not weights is refused, and never run."""

from __future__ import annotations

import pickle
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from precompute.taps import Tap
from precompute.teachers import teacher as teachers
from storage.constants import SHORT_NAMES
from storage.errors import UserError
from storage.objects.state_dict import as_f32
from storage.testing import TINY_CNN, TINY_VIT
from tests.conftest import write_teacher

HALF = {"mean": (0.5,), "std": (0.5,)}
VIT = {**TINY_VIT[1], "num_classes": 3}


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_teacher(tmp_path_factory.mktemp("weights") / "cnn.safetensors", TINY_CNN)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_teacher(tmp_path_factory.mktemp("weights") / "vit.safetensors", TINY_VIT)


def tiny_cnn(weights: str, **changes: Any) -> teachers.Teacher:
    settings = {"weights": weights, "arguments": {**TINY_CNN[1], "num_classes": 3}, "input_size": 64, **HALF}
    return teachers.find_teacher(TINY_CNN[0], **{**settings, **changes})


def tiny_vit(weights: str, **changes: Any) -> teachers.Teacher:
    return teachers.find_teacher(TINY_VIT[0], **{"weights": weights, "arguments": VIT, **HALF, **changes})


def named(name: str, **changes: Any) -> teachers.Teacher:
    """A teacher of this name with some file for weights, which is not loaded: nothing is asked of timm's hub."""
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        return teachers.find_teacher(name, weights=file.name, **changes)


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Stands for timm's hub: its weights are random, by a seed that a test may change."""
    state, create = {"seed": 0}, timm.create_model

    def create_model(model: str, pretrained: bool = False, **arguments: Any) -> Any:
        if pretrained:
            torch.manual_seed(state["seed"])
        return create(model, pretrained=False, **arguments)

    monkeypatch.setattr(timm, "create_model", create_model)
    return state


def same(model: nn.Module, state: dict[str, Tensor]) -> bool:
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[name], state[name]) for name in own)


class Hostile:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


# ---------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", SHORT_NAMES)
def test_short_names_are_pinned_to_tags_and_sizes_that_timm_knows(name: str) -> None:
    tag, size = SHORT_NAMES[name]
    assert "." in tag, "a name without a tag is whatever timm makes the default"
    config = timm.get_pretrained_cfg(tag)
    assert config is not None
    assert config.tag == tag.partition(".")[2]
    found = named(name)
    assert (found.name, found.model, found.input_size) == (name, tag, size)
    assert (found.mean, found.std) == (tuple(config.mean), tuple(config.std))


@pytest.mark.parametrize(
    ("name", "near"),
    [("efnet_b3", "effnet_b3"), ("resnt10t", "resnet10t"), ("vit_tiny_patch16_244", "vit_tiny_patch16_224")],
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UserError, match=rf"no teacher is called '{name}'\n  Did you mean '{near}'"):
        named(name)


def test_a_name_that_is_near_to_nothing_is_answered_with_the_short_names_alone() -> None:
    with pytest.raises(UserError) as caught:
        named("0123456789")
    assert "mobilenetv2" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_an_unknown_tag_of_a_known_network_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"'resnet34.a1_in2k'\n  Did you mean 'resnet34.a1_in1k'"):
        named("resnet34.a1_in2k")


def test_size_mean_and_std_that_are_not_given_are_those_of_the_weights() -> None:
    found = named("efficientnet_b3.ra2_in1k")
    assert found.input_size == 288
    assert found.mean == timm.get_pretrained_cfg("efficientnet_b3.ra2_in1k").mean
    assert named("effnet_b3").input_size == 224, "a short name has the papers' size"
    assert named("effnet_b3", input_size=300).input_size == 300


@pytest.mark.parametrize(("given", "found"), [((0.1,), (0.1, 0.1, 0.1)), ((0.1, 0.2, 0.3), (0.1, 0.2, 0.3))])
def test_one_number_of_mean_or_std_stands_for_three(given: tuple[float, ...], found: tuple[float, ...]) -> None:
    teacher = named("resnet34", mean=given, std=given)
    assert (teacher.mean, teacher.std) == (found, found)


@pytest.mark.parametrize(
    ("what", "given"),
    [
        ("mean", (0.1, 0.2)),
        ("std", (1, 1, 1, 1)),
        ("std", (0,)),
        ("std", (1, 1, -1)),
        ("mean", (float("nan"),)),
        ("std", (float("inf"),)),
        ("std", (float("nan"),)),
    ],
)
def test_mean_and_std_that_make_no_sense_are_refused(what: str, given: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match=f"`{what}=.*`: expected one number or three"):
        named("resnet34", **{"mean": (0.5,), "std": (0.5,), what: given})


@pytest.mark.parametrize("called", ["a b", "x" * 41, "../up", "ö", "a.b"])
def test_a_name_that_cannot_be_a_folder_is_refused(called: str) -> None:
    with pytest.raises(UserError, match="1 to 40 letters"):
        named("resnet34", teacher_name=called)


def test_a_teacher_is_called_as_one_says() -> None:
    assert named("resnet34", teacher_name="my_own-1").name == "my_own-1"


def test_a_timm_name_with_its_tag_becomes_a_name_for_the_store() -> None:
    assert named("efficientnet_b3.ra2_in1k").name == "efficientnet_b3_ra2_in1k"


@pytest.mark.parametrize("size", [0, 7, 5000])
def test_an_input_size_out_of_range_is_refused(size: int) -> None:
    with pytest.raises(UserError, match=f"`input_size={size}`"):
        named("resnet34", input_size=size)


def test_an_input_that_patches_do_not_divide_is_refused(vit: str) -> None:
    arguments = {name: value for name, value in VIT.items() if name != "img_size"}
    found = tiny_vit(vit, arguments=arguments, input_size=30)
    with pytest.raises(
        UserError, match=r"an input of 30 pixels is not a multiple of its patches of \d+\n  Give `input_size="
    ):
        teachers.load_teacher(found)


def test_img_size_among_the_arguments_is_the_input_size_and_cannot_differ_from_it(vit: str) -> None:
    assert tiny_vit(vit).input_size == VIT["img_size"] == 32
    with pytest.raises(UserError, match="`input_size=48`: `teacher_arg=img_size=32`"):
        tiny_vit(vit, input_size=48)


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, b"x"])
def test_arguments_that_cannot_be_recorded_are_refused(value: object) -> None:
    with pytest.raises(UserError, match="`teacher_arg=NAME=VALUE`"):
        named("resnet34", arguments={"drop_rate": value})


def test_an_argument_that_the_network_does_not_take_is_named(cnn: str) -> None:
    with pytest.raises(UserError, match=r"resnet10t: cannot be made with .*: .*no_such"):
        teachers.load_teacher(tiny_cnn(cnn, arguments={"no_such": 1}))


# ---------------------------------------------------------------------------------------------- identity


def test_identity_is_what_the_weights_are_and_not_where_they_lie(cnn: str, tmp_path: Path) -> None:
    elsewhere = str(shutil.copy(cnn, tmp_path / "other-name.safetensors"))
    assert tiny_cnn(elsewhere).id == tiny_cnn(cnn).id
    assert tiny_cnn(elsewhere, teacher_name="other").id == tiny_cnn(cnn).id


@pytest.mark.parametrize(
    "changes",
    [
        {"input_size": 96},
        {"mean": (0.4,)},
        {"std": (0.4,)},
        {"mean": (0.5, 0.5, 0.4)},
        {"arguments": {**TINY_CNN[1], "num_classes": 4}},
    ],
)
def test_identity_changes_with_size_mean_std_and_arguments(cnn: str, changes: dict[str, Any]) -> None:
    assert tiny_cnn(cnn, **changes).id != tiny_cnn(cnn).id


def test_identity_changes_with_one_bit_of_the_weights(cnn: str, tmp_path: Path) -> None:
    data = bytearray(Path(cnn).read_bytes())
    data[-1] ^= 1
    other = tmp_path / "cnn.safetensors"
    other.write_bytes(data)
    assert tiny_cnn(str(other)).id != tiny_cnn(cnn).id


def test_identity_of_hub_weights_is_what_the_hub_gives_and_not_the_tag(hub: dict[str, int]) -> None:
    name = "resnet10t.c3_in1k"
    before = teachers.find_teacher(name, arguments=TINY_CNN[1])
    assert teachers.find_teacher(name, arguments=TINY_CNN[1]).id == before.id
    hub["seed"] = 1
    assert teachers.find_teacher(name, arguments=TINY_CNN[1]).id != before.id


def test_hub_weights_with_a_new_random_head_are_refused() -> None:
    with pytest.raises(UserError, match="`teacher_arg=num_classes`: "):
        teachers.find_teacher("resnet10t.c3_in1k", arguments={**TINY_CNN[1], "num_classes": 3})


# ---------------------------------------------------------------------------------------------- weights


def test_safetensors_load_as_they_are_in_eval_mode_without_gradients(cnn: str) -> None:
    model = teachers.load_teacher(tiny_cnn(cnn))
    assert same(model, load_file(cnn))
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s, "epoch": 3}, lambda s: {"state_dict": s}])
def test_pth_files_load_plain_and_wrapped(cnn: str, tmp_path: Path, wrap: Any) -> None:
    path = tmp_path / "weights.pth"
    torch.save(wrap(load_file(cnn)), path)
    assert same(teachers.load_teacher(tiny_cnn(str(path))), load_file(cnn))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("legacy", [False, True])
def test_a_hostile_pickle_is_refused_and_not_run(cnn: str, tmp_path: Path, legacy: bool) -> None:
    path, made = tmp_path / "weights.pth", tmp_path / "made"
    state = {**load_file(cnn), "x": Hostile(made)}
    if legacy:
        path.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, path)
    with pytest.raises(UserError, match="refused: it is a pickle with more than tensors"):
        teachers.load_teacher(tiny_cnn(str(path)))
    assert not made.exists()
    pickle.loads(pickle.dumps(Hostile(made))).close()
    assert made.exists(), "the pickle would have done harm"


def test_a_weights_file_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"`weights=/no/such.safetensors`: cannot be read: No such file"):
        tiny_cnn("/no/such.safetensors")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        tiny_cnn("/")


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
@pytest.mark.parametrize("damage", ["empty", "garbage", "half"])
def test_a_file_that_is_not_weights_is_refused_by_name(cnn: str, tmp_path: Path, ending: str, damage: str) -> None:
    path = tmp_path / f"w.{ending}"
    if ending == "pth":
        torch.save(load_file(cnn), path)
    whole = path.read_bytes() if ending == "pth" else Path(cnn).read_bytes()
    path.write_bytes({"empty": b"", "garbage": b"garbage!" * 50, "half": whole[: len(whole) // 2]}[damage])
    with pytest.raises(UserError, match=f"w.{ending}: (cannot be read as weights|refused|not a file of weights)"):
        teachers.load_teacher(tiny_cnn(str(path)))


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"model": [1]}])
def test_a_pth_that_holds_no_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match="expected a state dict of tensors"):
        teachers.load_teacher(tiny_cnn(str(tmp_path / "w.pth")))


def test_weights_of_another_shape_are_refused_naming_what_does_not_fit(cnn: str, vit: str) -> None:
    with pytest.raises(UserError, match=r"does not fit resnet10t: fc.weight has shape.*\n.*num_classes=3`$"):
        teachers.load_teacher(tiny_cnn(cnn, arguments={**TINY_CNN[1], "num_classes": 5}))
    with pytest.raises(UserError, match=r"does not fit resnet10t: .*missing.*\n  None of its 44 names is one of the"):
        teachers.load_teacher(tiny_cnn(vit))
    with pytest.raises(UserError, match=r"does not fit vit_tiny_patch16_224: head.weight has .*\n.*num_classes=3`$"):
        teachers.load_teacher(tiny_vit(vit, arguments={**VIT, "num_classes": 5}))


@pytest.mark.parametrize(
    ("name", "shape"), [("pos_embed", (1, 12, 48)), ("pos_embed", (3,)), ("patch_embed.proj.weight", (3,))]
)
def test_weights_that_timm_cannot_resample_are_refused(vit: str, tmp_path: Path, name: str, shape: Any) -> None:
    save_file({**load_file(vit), name: torch.zeros(shape)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"w.safetensors: does not fit vit_tiny_patch16_224"):
        teachers.load_teacher(tiny_vit(str(tmp_path / "w.safetensors")))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precisions_become_f32(cnn: str, tmp_path: Path, kind: torch.dtype) -> None:
    state = {name: t.to(kind) if t.is_floating_point() else t for name, t in load_file(cnn).items()}
    save_file(state, tmp_path / "w.safetensors")
    model = teachers.load_teacher(tiny_cnn(str(tmp_path / "w.safetensors")))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    read = as_f32(load_file(tmp_path / "w.safetensors"))
    assert {t.dtype for t in read.values()} == {torch.float32, torch.int64}
    assert same(model, {name: t.float() if t.is_floating_point() else t for name, t in state.items()})


def test_classes_are_read_from_the_metadata_of_safetensors(cnn: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(load_file(cnn), path, metadata={"classes": '["cat", "dog", "owl"]'})
    assert tiny_cnn(str(path)).classes == ("cat", "dog", "owl")
    assert tiny_cnn(cnn).classes is None


@pytest.mark.parametrize("classes", ["5", '"abc"', "[1, 2]", '{"a": 1}', "[]", "nonsense"])
def test_classes_that_are_not_a_list_of_names_are_unknown(tmp_path: Path, classes: str) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata={"classes": classes})
    assert tiny_cnn(str(path)).classes is None


def test_a_vit_of_another_input_size_has_its_position_embeddings_resampled(vit: str) -> None:
    from precompute.export.pytorch import live_teacher

    arguments = {name: value for name, value in VIT.items() if name != "img_size"}
    teacher = tiny_vit(vit, arguments=arguments, input_size=48)
    model: Any = teachers.load_teacher(teacher)
    old, new = load_file(vit)["pos_embed"], model.pos_embed
    assert new.shape == (1, 1 + 36, 48)
    assert torch.equal(new[:, 0], old[:, 0]), "the class token has no place in the grid"
    assert torch.allclose(new[:, 1:].mean(), old[:, 1:].mean(), atol=1e-3)
    rows = live_teacher(teacher, [Tap("class_row")], 32)(torch.zeros(2, 32, 32, 3, dtype=torch.uint8))[0]
    assert rows.shape == (2, 3, 3, 37)


def test_a_network_that_cannot_take_the_images_is_refused_by_name(tmp_path: Path) -> None:
    from precompute.export.pytorch import live_teacher

    arguments = {**TINY_CNN[1], "in_chans": 1}
    weights = write_teacher(tmp_path / "w.safetensors", (TINY_CNN[0], arguments))
    teacher = tiny_cnn(weights, arguments={**arguments, "num_classes": 3}, teacher_name="gray")
    with pytest.raises(UserError, match=r"gray: resnet10t cannot take 64x64 RGB images: .*channels"):
        live_teacher(teacher, [Tap("logits")], 32)


# ---------------------------------------------------------------------------------------------- descriptions


def test_a_teacher_is_described_by_its_kind_layers_heads_and_prefix(cnn: str, vit: str) -> None:
    about = tiny_cnn(cnn).manifest(teachers.anatomy(teachers.load_teacher(tiny_cnn(cnn)), 64)).plain()
    assert (about["network"], about["layers"], about["weights"], about["classes"]) == ("cnn", 4, cnn, None)
    assert not about.keys() & {"heads", "prefix"}, "older stores have no more"
    about = tiny_vit(vit).manifest(teachers.anatomy(teachers.load_teacher(tiny_vit(vit)), 32)).plain()
    assert (about["network"], about["layers"], about["heads"], about["prefix"]) == ("vit", 3, 3, ["class"])


def test_a_network_that_is_neither_is_described_as_other() -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
    about = teachers.anatomy(model, 224)
    assert (about.network, about.layers, about.stages) == ("other", 0, 4)
