"""Weights as people have them: prefixes, self-distillation's files, no classifier, untrained, and other sources."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor

from precompute.capabilities import offers_of
from precompute.teachers import teacher
from precompute.verify_targets import teacher_of
from storage.errors import UserError
from storage.objects.state_dict import digest_of_state
from storage.store.store import Store
from storage.testing import TINY_CNN, TINY_VIT
from tests.pipeline.hub import Hub, running
from tests.precompute.teachers.test_weights_files import facebook

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

State = dict[str, Tensor]
HALF = {"mean": (0.5,), "std": (0.5,)}


def made(seed: int, classes: int = 3, spec: tuple[str, dict[str, Any]] = TINY_VIT) -> State:
    torch.manual_seed(seed)
    return dict(timm.create_model(spec[0], num_classes=classes, **spec[1]).state_dict())


def behind(prefix: str, given: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in given.items()}


def saved(path: Path, content: Any) -> str:
    torch.save(content, path)
    return str(path)


def find(weights: str, spec: tuple[str, dict[str, Any]] = TINY_VIT, classes: int | None = 3, **changes: Any) -> Any:
    """The teacher, its tensors, and the lines that were said."""
    lines: list[str] = []
    arguments = {**spec[1], **({} if classes is None else {"num_classes": classes})}
    given = {"weights": weights, "arguments": arguments, **HALF, **changes, "say": lines.append}
    found = teacher.find_teacher(spec[0], **given)
    return found, dict(teacher.load_teacher(found).state_dict()), lines


def equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------------------------------------- prefixes


@pytest.mark.parametrize(
    "prefix",
    [
        *("backbone.", "encoder.", "base_encoder.", "teacher.", "student.", "model.", "anything.at.all."),
        *("module.backbone.", "_orig_mod.module.model.", "teacher.backbone.", "model.teacher.backbone.encoder."),
    ],
)
@pytest.mark.parametrize("spec", [TINY_VIT, TINY_CNN], ids=["vit", "cnn"])
def test_prefixes_and_their_chains_are_stripped(tmp_path: Path, prefix: str, spec: tuple[str, dict[str, Any]]) -> None:
    path = saved(tmp_path / "w.pth", behind(prefix, made(1, spec=spec)))
    found, state, lines = find(path, spec, input_size=32)
    assert equal(state, made(1, spec=spec))
    assert found.arguments["num_classes"] == 3
    left = re.sub(r"^(_orig_mod\.)?(module\.)?", "", prefix)
    assert lines == [f"{path}: the prefix {left!r} was stripped from {len(state)} names"]


def test_a_wrappers_prefix_alone_is_nothing_to_tell(tmp_path: Path) -> None:
    _, state, lines = find(saved(tmp_path / "w.pth", {"model": behind("module.", made(1))}))
    assert equal(state, made(1))
    assert lines == []


def test_what_lies_beside_the_prefix_is_left_out_and_told(tmp_path: Path) -> None:
    others = {"queue": torch.zeros(4), "predictor.0.weight": torch.zeros(2, 2), "head.mlp.0.weight": torch.zeros(2, 2)}
    path = saved(tmp_path / "w.pth", {**others, **behind("backbone.", made(1))})
    _, state, lines = find(path)
    assert equal(state, made(1))
    assert lines == [
        f"{path}: the prefix 'backbone.' was stripped from 44 names; 3 other tensors were left out "
        "(queue, predictor.0.weight, head.mlp.0.weight)"
    ]


def test_what_lies_behind_the_prefix_and_is_not_the_networks_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", behind("backbone.", made(1)))
    with pytest.raises(UserError, match=r"12 unexpected \(blocks\.2\.norm1\.weight, "):
        find(path, (TINY_VIT[0], {**TINY_VIT[1], "depth": 2}))


def test_timms_conversion_works_behind_a_prefix_too(tmp_path: Path) -> None:
    spec = ("deit3_small_patch16_224", TINY_VIT[1])
    given = made(1, spec=spec)
    theirs = {re.sub(r"ls(\d)\.gamma", r"gamma_\1", name): tensor for name, tensor in given.items()}
    _, state, lines = find(saved(tmp_path / "w.pth", behind("net.", theirs)), spec)
    assert equal(state, given)
    assert "the prefix 'net.' was stripped" in lines[0]
    spec = ("convnext_tiny", {"dims": (8, 12, 16, 24), "depths": (1, 1, 1, 1)})
    given = made(1, spec=spec)
    theirs = facebook(given)
    _, state, lines = find(saved(tmp_path / "w.pth", behind("net.", theirs)), spec, input_size=64)
    assert equal(state, given)
    assert "the prefix 'net.' was stripped" in lines[0]


# ---------------------------------------------------------------------------------------------- several networks


def test_of_two_parts_that_fit_equally_well_one_is_to_be_chosen(tmp_path: Path) -> None:
    """MoCo v3's file: both encoders have projection heads in the classifier's place."""
    head = {"head.0.weight": torch.zeros(8, 48), "head.1.running_mean": torch.zeros(8), "head.3.weight": torch.ones(8)}
    base, momentum = ({**made(seed, 0), **head} for seed in (1, 2))
    content = {**behind("module.base_encoder.", base), **behind("module.momentum_encoder.", momentum)}
    path = saved(tmp_path / "w.pth", {"state_dict": content, "epoch": 3})
    with pytest.raises(UserError) as caught:
        find(path, classes=None)
    assert "the prefixes 'base_encoder.' and 'momentum_encoder.', which fit equally well" in str(caught.value)
    assert "Choose one: `weights_key=base_encoder` or `weights_key=momentum_encoder`" in str(caught.value)
    for key, seed in (("base_encoder", 1), ("momentum_encoder", 2), ("module.base_encoder", 1)):
        found, state, lines = find(path, classes=None, weights_key=key)
        assert equal(state, made(seed, 0))
        assert found.identity.plain()["weights key"] == f"state_dict.{key}"
        projection = "a projection head in the classifier's place was left out: 3 tensors (head.0.weight, "
        assert lines[0].startswith(f"{path}: {projection}")
        assert lines[1:] == [f"{path}: it has no classifier, so the network is made without one (num_classes=0)"]
        again = find(path, classes=0, weights_key=f"state_dict.{key}")[0]
        assert again.id == found.id, "what is recorded gives the same teacher"


def test_a_key_may_open_names_in_a_file_of_nothing_but_weights(tmp_path: Path) -> None:
    path = str(tmp_path / "w.safetensors")
    save_file({**behind("a.", made(1)), **behind("b.net.", made(2))}, path)
    assert equal(find(path, weights_key="a")[1], made(1))
    assert equal(find(path, weights_key="b.net.")[1], made(2))
    assert equal(find(path, weights_key="b")[1], made(2))
    with pytest.raises(UserError, match="there is no state dict of tensors at this key"):
        find(path, weights_key="c")


def test_files_of_self_distillation_give_the_teacher(tmp_path: Path) -> None:
    """DINO's file: two dictionaries, each a backbone and a projection head."""
    head = {"head.mlp.0.weight": torch.zeros(2, 2), "head.last_layer.weight_g": torch.ones(2)}
    content = {
        "student": {**behind("module.backbone.", made(1, 0)), **behind("module.", head)},
        "teacher": {**behind("backbone.", made(2, 0)), **head},
        "epoch": 7,
    }
    path = saved(tmp_path / "w.pth", content)
    found, state, lines = find(path, classes=None)
    assert equal(state, made(2, 0))
    assert found.identity.weights_key == "teacher"
    assert lines == [
        f"weights of {path}: teacher (it also has student); choose others by `weights_key=KEY`",
        f"{path}: the prefix 'backbone.' was stripped from 42 names; 2 other tensors were left out "
        "(head.mlp.0.weight, head.last_layer.weight_g)",
        f"{path}: it has no classifier, so the network is made without one (num_classes=0)",
    ]
    assert equal(find(path, classes=None, weights_key="student")[1], made(1, 0))
    del content["teacher"]
    assert equal(find(saved(tmp_path / "s.pth", content), classes=None)[1], made(1, 0))
    for name in ("model", "state_dict"):  # what worked before is taken as before
        older = saved(tmp_path / f"{name}.pth", {"teacher": made(1), name: made(3)})
        found, state, _ = find(older)
        assert equal(state, made(3))
        assert found.weights_key is None


# ---------------------------------------------------------------------------------------------- classifiers


@pytest.mark.parametrize("spec", [TINY_VIT, TINY_CNN], ids=["vit", "cnn"])
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_file_without_a_classifier_makes_a_network_without_one(
    tmp_path: Path, spec: tuple[str, dict[str, Any]], ending: str
) -> None:
    path = tmp_path / f"w.{ending}"
    body = made(1, 0, spec)
    (save_file if ending == "safetensors" else torch.save)(body, path)
    found, state, lines = find(str(path), spec, None, input_size=32)
    assert equal(state, body)
    assert lines == [f"{path}: it has no classifier, so the network is made without one (num_classes=0)"]
    assert found.arguments == {**spec[1], "num_classes": 0}
    assert found.id == find(str(path), spec, 0, input_size=32)[0].id, "as if it was said"
    store = Store.create(tmp_path / "S")
    store.add(replace(found, name="t").manifest(teacher.anatomy(teacher.load_teacher(found), 32)))
    recorded = teacher_of("t", store.teachers()["t"], str(path))
    assert equal(dict(teacher.load_teacher(recorded).state_dict()), body)
    with pytest.raises(UserError, match="It has no classifier: `teacher_arg=num_classes=0`"):
        find(str(path), spec, 3, input_size=32)


def test_other_classes_than_the_networks_are_told_with_the_argument(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", behind("model.", made(1, 5)))
    for classes in (None, 3, 0):
        with pytest.raises(UserError, match="Its classifier has 5 classes: `teacher_arg=num_classes=5`"):
            find(path, classes=classes)
    two = ("deit_tiny_distilled_patch16_224", TINY_VIT[1])
    path = saved(tmp_path / "two.pth", made(1, 5, two))
    with pytest.raises(UserError, match="Its classifier has 5 classes: `teacher_arg=num_classes=5`"):
        find(path, two, None)
    found, _, _ = find(saved(tmp_path / "none.pth", made(1, 0, two)), two, None)
    assert found.arguments["num_classes"] == 0


# ---------------------------------------------------------------------------------------------- untrained


def test_untrained_weights_are_those_of_their_seed(tmp_path: Path) -> None:
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    found, state, lines = find("random:7")
    assert torch.equal(torch.rand(1), expected), "torch's own generator is left alone"
    assert equal(state, made(7))
    assert lines == [f"untrained weights of {TINY_VIT[0]}, seed 7"]
    assert found.digest == digest_of_state(made(7))
    assert found.id == find("random:7")[0].id
    assert found.id != find("random:8")[0].id
    manifest = replace(found, name="t").manifest(teacher.anatomy(teacher.load_teacher(found), 32))
    assert manifest.weights == "random:7"
    store = Store.create(tmp_path / "S")
    store.add(manifest)
    again = teacher_of("t", store.teachers()["t"], "random:7")
    assert equal(dict(teacher.load_teacher(again).state_dict()), state)
    with pytest.raises(UserError, match="random:7 gives other weights than those that were recorded"):
        teacher.load_teacher(replace(found, digest="0" * 64))


def test_untrained_weights_go_by_the_input_size() -> None:
    spec = (TINY_VIT[0], {name: value for name, value in TINY_VIT[1].items() if name != "img_size"})
    small, large = (find("random:0", spec, input_size=size) for size in (32, 64))
    assert small[1]["pos_embed"].shape != large[1]["pos_embed"].shape
    assert small[0].digest != large[0].digest


@pytest.mark.parametrize("weights", ["random:", "random:x", "random:-1", "random:1.5", "random:٣"])
def test_a_seed_that_is_no_number_is_refused(weights: str) -> None:
    with pytest.raises(UserError, match=r"`weights=random:.*`: expected a whole number after random:(.|\n)*random:0"):
        find(weights)


def test_untrained_weights_have_no_key() -> None:
    with pytest.raises(UserError, match="`weights_key=x`: there is no file of weights"):
        find("random:0", weights_key="x")


# ---------------------------------------------------------------------------------------------- other sources


def written_by_timm(folder: Path) -> State:
    """A folder as timm writes one for the Hub: a tiny network at 32 pixels with its own mean and std."""
    folder.mkdir(parents=True)
    config = {
        "architecture": TINY_VIT[0],
        "num_classes": 3,
        "num_features": 48,
        "model_args": TINY_VIT[1],
        "pretrained_cfg": {
            "input_size": [3, 32, 32],
            "fixed_input_size": True,
            "mean": [0.1, 0.2, 0.3],
            "std": [0.4, 0.5, 0.6],
            "num_classes": 3,
            "classifier": "head",
            "first_conv": "patch_embed.proj",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(made(4), str(folder / "model.safetensors"))
    return made(4)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with running() as (place, address):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{address}{template[1]}{template[2]}")
        yield place


def check_written(name: str, state: State, called: str) -> None:
    lines: list[str] = []
    found = teacher.find_teacher(name, say=lines.append)
    assert (found.name, found.input_size) == (called, 32)
    assert (found.mean, found.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert found.digest == digest_of_state(state)
    assert equal(dict(teacher.load_teacher(found).state_dict()), state)
    assert lines == [f"weights of {found.model}"]
    assert offers_of(name).parameters == sum(tensor.numel() for tensor in state.values())


def test_a_folder_that_timm_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = written_by_timm(tmp_path / "some" / "tiny.v1")
    check_written(f"local-dir:{tmp_path}/some/tiny.v1/", state, "tiny_v1")
    monkeypatch.chdir(tmp_path)
    check_written("local-dir:some/tiny.v1", state, "tiny_v1")
    path = saved(tmp_path / "w.pth", behind("net.", made(5)))
    found = teacher.find_teacher("local-dir:some/tiny.v1", weights=path)
    assert equal(dict(teacher.load_teacher(found).state_dict()), made(5)), "its network with other weights"
    for wrong in ("local-dir:nowhere", "local-dir:", "hf-hub:"):
        with pytest.raises(UserError, match=f"teacher {wrong.partition(':')[0]}:.*: cannot be made: ") as caught:
            teacher.find_teacher(wrong)
        assert "hf-hub:USER/NAME or local-dir:FOLDER, with a config.json" in str(caught.value)


def test_a_name_on_the_hub(tmp_path: Path, hub: Hub) -> None:
    state = written_by_timm(tmp_path / "tiny")
    hub.private["alice/tiny_vit.v2"] = False
    hub.commits["alice/tiny_vit.v2"] = [{path.name: path.read_bytes() for path in (tmp_path / "tiny").iterdir()}]
    check_written("hf-hub:alice/tiny_vit.v2", state, "tiny_vit_v2")
    with pytest.raises(UserError, match="hf-hub:alice/absent"):
        teacher.find_teacher("hf-hub:alice/absent")
