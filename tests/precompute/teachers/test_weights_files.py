"""Files of weights as trainings leave them and others publish them: taken as timm takes them, or said what they are."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from precompute.teachers import teacher
from precompute.verify_targets import teacher_of
from storage.errors import IdentityError, UserError
from storage.objects.checkpoint_file import EARLIER
from storage.objects.weights_file import WeightsFile
from storage.store.manifests import TeacherManifest
from storage.store.store import Store
from storage.testing import TINY_VIT

if TYPE_CHECKING:
    from collections.abc import Callable

VIT = {**TINY_VIT[1], "num_classes": 3}
State = dict[str, Tensor]


def state(seed: int = 0, spec: tuple[str, dict[str, Any]] = TINY_VIT) -> State:
    torch.manual_seed(seed)
    model = timm.create_model(spec[0], num_classes=3, **spec[1])
    return dict(model.state_dict())


def saved(path: Path, content: Any) -> str:
    torch.save(content, path)
    return str(path)


def find(weights: str, name: str = TINY_VIT[0], **changes: Any) -> teacher.Teacher:
    return teacher.find_teacher(
        name, **{"weights": weights, "arguments": VIT, "mean": (0.5,), "std": (0.5,), **changes}
    )


def loaded(weights: str, **changes: Any) -> State:
    return teacher.load_teacher(find(weights, **changes)).state_dict()


def equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def behind(prefix: str, given: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in given.items()}


# ---------------------------------------------------------------------------------------------- which weights


@pytest.mark.parametrize(
    "content",
    [
        lambda a, b: {"state_dict": a, "state_dict_ema": b, "epoch": 3},
        lambda a, b: {"model": a, "model_ema": b},
        lambda a, b: {"model": a, "state_dict": b},
        lambda a, b: {"state_dict": b, "state_dict_ema": None},
        lambda a, b: {"model": a, "model_ema": a, "state_dict_ema": behind("module.", b)},
        lambda a, b: {"state_dict": behind("_orig_mod.module.", b), "args": argparse.Namespace(lr=0.1)},
    ],
    ids=["ema", "model ema", "both names", "no ema", "two emas, ddp", "compiled, arguments"],
)
def test_the_weights_that_timms_own_loader_takes_are_taken(tmp_path: Path, content: Callable[..., Any]) -> None:
    path = saved(tmp_path / "w.pth", content(state(0), state(1)))
    assert equal(loaded(path), timm.models.load_state_dict(path))
    assert equal(timm.models.load_state_dict(path), state(1))


def test_which_weights_are_taken_is_said_and_a_key_takes_others(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", {"state_dict": state(0), "state_dict_ema": state(1)})
    lines: list[str] = []
    find(path, say=lines.append)
    assert lines == [
        f"weights of {path}: state_dict_ema (it also has state_dict), as timm chooses; "
        "choose others by `weights_key=KEY`"
    ]
    assert equal(loaded(path, weights_key="state_dict"), state(0))
    assert equal(loaded(path, weights_key="state_dict_ema"), state(1))
    find(saved(tmp_path / "one.pth", {"state_dict": state(0), "epoch": 3}), say=lines.append)
    assert len(lines) == 1, "there is nothing to choose"


def test_a_key_goes_down_several_levels(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", {"a.b": {"c": state(2)}, "teacher": {"net": state(1)}, "state_dict": state(0)})
    assert equal(loaded(path, weights_key="teacher.net"), state(1))
    assert equal(loaded(path, weights_key="a.b.c"), state(2))
    with pytest.raises(UserError, match=r"`weights_key=teacher`: .*no state dict .*; it holds a dictionary"):
        find(path, weights_key="teacher")
    with pytest.raises(UserError, match=r"`weights_key=ema`: .*\n.* dictionaries of tensors: `weights_key=a\.b\.c`"):
        find(path, weights_key="ema")


def test_a_key_without_a_file_to_choose_in_is_refused() -> None:
    with pytest.raises(UserError, match="`weights_key=x`: there is no file of weights"):
        teacher.find_teacher("resnet34", weights_key="x")
    with pytest.raises(UserError, match=r"`weights_key=x`: g\.onnx is a ready graph"):
        teacher.find_teacher("g.onnx", weights_key="x")


def test_other_weights_of_a_file_are_another_teacher_and_old_identities_stay(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", {"state_dict": state(0), "state_dict_ema": state(1)})
    average, plain = find(path), find(path, weights_key="state_dict")
    assert average.id != plain.id
    assert plain.identity.plain().keys() == find(saved(tmp_path / "p.pth", state(0))).identity.plain().keys()
    store = Store.create(tmp_path / "S")
    parts = teacher.anatomy(teacher.load_teacher(plain), plain.input_size)
    store.add(replace(plain, name="t").manifest(parts))  # as earlier versions recorded it
    with pytest.raises(IdentityError, match=r"weights key: .*state_dict_ema"):
        store.require_same(TeacherManifest, "t", average.identity)
    again = teacher_of("t", store.teachers()["t"], path)
    assert equal(teacher.load_teacher(again).state_dict(), dict(WeightsFile(path).weights(order=EARLIER).state))
    store.add(replace(average, name="u").manifest(parts))
    assert equal(teacher.load_teacher(teacher_of("u", store.teachers()["u"], path)).state_dict(), state(1))


# ---------------------------------------------------------------------------------------------- other names


def openai(given: State) -> State:
    """A CLIP's state dict under OpenAI's names."""
    names = {
        "cls_token": "class_embedding",
        "pos_embed": "positional_embedding",
        "patch_embed.proj.weight": "conv1.weight",
    }
    words = [
        ("norm_pre", "ln_pre"),
        (r"^norm\.", "ln_post."),
        (r"^blocks", "transformer.resblocks"),
        (r"norm(\d)", r"ln_\1"),
        (r"qkv\.", "in_proj_"),
        (r"attn\.proj", "attn.out_proj"),
        ("fc1", "c_fc"),
        ("fc2", "c_proj"),
    ]
    found = {}
    for name, tensor in given.items():
        if name.startswith("head."):
            continue
        new = names.get(name, name)
        for pattern, word in words if new == name else ():
            new = re.sub(pattern, word, new)
        tensor = tensor[0, 0] if name == "cls_token" else tensor[0] if name == "pos_embed" else tensor
        found[f"visual.{new}"] = tensor.contiguous()
    return {**found, "visual.proj": given["head.weight"].T.contiguous(), "token_embedding.weight": torch.zeros(2, 2)}


def facebook(given: State) -> State:
    """A ConvNeXt's state dict under the names of its authors."""
    words = [
        (r"^stem\.", "downsample_layers.0."),
        (r"stages\.(\d)\.downsample", r"downsample_layers.\1"),
        (r"stages\.(\d)\.blocks\.", r"stages.\1."),
        ("conv_dw", "dwconv"),
        (r"mlp\.fc", "pwconv"),
        (r"head\.norm", "norm"),
        (r"head\.fc", "head"),
    ]
    found = {}
    for name, tensor in given.items():
        for pattern, word in words:
            name = re.sub(pattern, word, name)
        found[name] = tensor
    return found


CLIP = ("vit_base_patch16_clip_224.openai", {**TINY_VIT[1]})
DEIT3 = ("deit3_small_patch16_224", {**TINY_VIT[1]})
CONVNEXT = ("convnext_tiny", {"dims": (8, 12, 16, 24), "depths": (1, 1, 1, 1)})


@pytest.mark.parametrize(
    ("spec", "rename"),
    [
        (CLIP, openai),
        (DEIT3, lambda s: {re.sub(r"ls(\d)\.gamma", r"gamma_\1", n): t for n, t in s.items()}),
        (CONVNEXT, facebook),
    ],
    ids=["openai", "deit3", "convnext"],
)
def test_names_that_timm_converts_are_converted_by_it(
    tmp_path: Path, spec: tuple[str, dict[str, Any]], rename: Callable[[State], State]
) -> None:
    name, arguments = spec[0], {**spec[1], "num_classes": 3}
    given = {n: torch.randn(t.shape) for n, t in state(1, spec).items()}
    path = saved(tmp_path / "w.pth", rename(given))
    overlay = {"file": path, "num_classes": 3, "custom_load": False}
    theirs = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments).state_dict()
    assert all(torch.equal(theirs[n], given[n]) for n in given if n != "head.bias"), "they were made of these"
    assert equal(loaded(path, name=name, arguments=arguments), theirs)


def test_position_embeddings_are_resampled_as_timm_does_for_the_network(tmp_path: Path) -> None:
    arguments = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 3}
    for name in ("flexivit_small", "vit_small_patch16_224"):
        given = timm.create_model(name, img_size=32, **arguments).state_dict()
        path = saved(tmp_path / "w.pth", {n: torch.randn(t.shape) for n, t in given.items()})
        overlay = {"file": path, "num_classes": 3, "custom_load": False}
        theirs = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, img_size=48, **arguments)
        assert equal(loaded(path, name=name, arguments=arguments, input_size=48), theirs.state_dict())


# ---------------------------------------------------------------------------------------------- what a file is


def refused(path: str, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        loaded(path, **changes)
    text = str(caught.value)
    assert "\x1b" not in text
    assert "weights_only" not in text
    return text


def test_dictionaries_in_a_file_are_listed_with_their_first_names(tmp_path: Path) -> None:
    inner = behind("backbone.", state())
    path = saved(tmp_path / "w.pth", {"a": inner, "b": inner, "epoch": 7, "args": argparse.Namespace(a=1)})
    text = refused(path)
    assert "expected a state dict of tensors; it holds a dictionary {a: 44 tensors (backbone.cls_token, " in text
    assert "epoch: int; args: Namespace}" in text
    assert text.endswith("`weights_key=a`")
    text = refused(path, weights_key="a", arguments={**VIT, "depth": 4})
    assert "12 missing (blocks.3.norm1.weight, " in text
    assert "Its weights are a (it also has b); choose others by `weights_key=KEY`" in text


def test_both_sides_of_a_file_that_does_not_fit_are_named(tmp_path: Path) -> None:
    text = refused(saved(tmp_path / "w.pth", {f"x_{name}": tensor for name, tensor in state().items()}))
    assert "44 missing (cls_token, pos_embed, patch_embed.proj.weight, …); 44 unexpected (x_cls_token, x_pos" in text


def test_names_of_another_library_are_said_to_be(tmp_path: Path) -> None:
    theirs = {
        "vit.embeddings.cls_token": torch.zeros(1, 1, 48),
        "vit.encoder.layer.0.attention.attention.query.weight": torch.zeros(48, 48),
    }
    text = refused(saved(tmp_path / "w.pth", theirs))
    assert "2 unexpected (vit.embeddings.cls_token, vit.encoder.layer.0.attention" in text
    assert "None of its 2 names is one of the network's (they look like those of transformers' models)" in text
    assert "teacher_arg" not in text


def test_a_file_without_a_classifier_is_taken_by_a_network_without_one(tmp_path: Path) -> None:
    body = {name: tensor for name, tensor in state().items() if not name.startswith("head.")}
    path = saved(tmp_path / "w.pth", body)
    assert refused(path).endswith("It has no classifier: `teacher_arg=num_classes=0`")
    assert equal(loaded(path, arguments={**VIT, "num_classes": 0}), body)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_archives_of_other_kinds_are_named_with_a_way_to_weights(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    text = refused(str(tmp_path / "script.pt"))
    assert "script.pt: not a file of weights: it is a TorchScript archive" in text
    assert "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')" in text
    np.savez(tmp_path / "jax.npz", cls=np.zeros(3))
    text = refused(str(tmp_path / "jax.npz"))
    assert "it is NumPy arrays, as JAX models are published\n  If timm knows the model" in text


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
        ({"state_dict": {}, "best": np.float64(0.5)}, r"numpy\..*scalar"),
        ({"args": Path("a")}, "pathlib"),
    ],
)
def test_what_of_a_pickle_could_run_code_is_named(tmp_path: Path, content: Any, found: str) -> None:
    text = refused(saved(tmp_path / "w.pth", content))
    assert re.search(rf"refused: it is a pickle with more than tensors in it, which could run code: .*{found}", text)
    assert text.endswith("save its state dict alone, as safetensors: safetensors.torch.save_file")


def test_names_in_a_strangers_file_are_shown_without_control_characters(tmp_path: Path) -> None:
    text = refused(saved(tmp_path / "w.pth", {"\x1b[31mred": 1, "x" * 500: 2, 5: {"a": torch.zeros(1)}}))
    assert "\\x1b[31mred" in text
    assert len(text) < 400
