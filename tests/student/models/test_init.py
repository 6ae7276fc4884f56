"""Students that begin from weights: what is taken, what is new, what is frozen; fine-tuning from end to end."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from pipeline.recipes.loader import load_recipe
from storage.errors import UserError
from storage.objects.weights_file import WeightsFile
from student.models.build import build_student
from student.models.files import load_student
from student.models.init import begin_from, freeze, normalization
from student.training import train as trainer
from tests.conftest import Quiet
from tests.student.runs import STUDENT, job, run, u8, weights

if TYPE_CHECKING:
    from student.settings import StudentConfig

BODY = "blocks.*"


@pytest.fixture(scope="module")
def donor(world, tmp_path_factory):
    """A trained student's file."""
    out = tmp_path_factory.mktemp("donor") / "run"
    run(world, out, "scratch", "optim.epochs=1")
    return out / "last.safetensors"


def student(*settings: str, classes: int = 3):
    torch.manual_seed(7)
    recipe = load_recipe("scratch", [*STUDENT, *settings])
    return build_student(recipe.student, classes)[0], recipe.student


def file_of(settings: StudentConfig) -> WeightsFile | None:
    return WeightsFile(settings.weights) if settings.weights else None


def taken(*settings: str, classes: int = 3, names=None):
    model, chosen = student(*settings, classes=classes)
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lines: list[str] = []
    begin_from(model, chosen, file_of(chosen), names, lines.append)
    return model.state_dict(), fresh, lines


def test_all_is_taken_from_a_students_file_and_from_pth(donor, tmp_path):
    state = load_file(donor)
    torch.save({"model": state}, tmp_path / "w.pth")
    for path in (donor, tmp_path / "w.pth"):
        ours, _, lines = taken(f"student.weights={path}")
        assert all(torch.equal(ours[name], state[name]) for name in state)
        assert lines == [f"begins from {path}: {len(state)} of {len(state)} tensors"]


def test_of_several_weights_in_a_file_those_are_taken_that_timm_takes_or_a_key_names(donor, tmp_path):
    first = load_file(donor)
    second = {name: tensor + 1 for name, tensor in first.items()}
    torch.save({"state_dict": first, "state_dict_ema": second}, tmp_path / "w.pth")
    path = f"student.weights={tmp_path / 'w.pth'}"
    ours, _, lines = taken(path)
    theirs = timm.models.load_state_dict(str(tmp_path / "w.pth"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert "w.pth, state_dict_ema (it also has state_dict): " in lines[0]
    ours, _, _ = taken(path, "student.weights_key=state_dict")
    assert all(torch.equal(ours[name], first[name]) for name in first)
    with pytest.raises(UserError, match="weights_key selects from a file of weights"):
        student("student.weights_key=state_dict")


def test_a_head_of_other_classes_is_new_and_said(donor):
    state = load_file(donor)
    ours, fresh, lines = taken(f"student.weights={donor}", classes=5)
    assert torch.equal(ours["head.weight"], fresh["head.weight"])
    assert torch.equal(ours["blocks.0.attn.qkv.weight"], state["blocks.0.attn.qkv.weight"])
    assert "new are head.weight, head.bias (a head of other classes)" in lines[0]
    ours, fresh, lines = taken(f"student.weights={donor}", names=("ant", "bee", "cat"))  # as many, but others
    assert torch.equal(ours["head.weight"], fresh["head.weight"])
    assert "new are head.weight" in lines[0]
    ours, _, lines = taken(f"student.weights={donor}", names=("class0", "class1", "class2"))
    assert torch.equal(ours["head.weight"], state["head.weight"])


def test_position_embeddings_of_another_grid_are_resampled_as_timm_does(donor):
    from timm.layers import resample_abs_pos_embed

    state = load_file(donor)
    ours, _, _ = taken(f"student.weights={donor}", "student.img_size=24")
    expected = resample_abs_pos_embed(state["pos_embed"], [6, 6], [8, 8], num_prefix_tokens=1)
    assert torch.allclose(ours["pos_embed"], expected)
    ours, _, _ = taken(f"student.weights={donor}", "student.patch_size=8")
    assert ours["patch_embed.proj.weight"].shape[-1] == 8
    assert torch.equal(ours["blocks.1.mlp.fc1.weight"], state["blocks.1.mlp.fc1.weight"])


def test_patterns_choose_what_is_taken(donor):
    state = load_file(donor)
    ours, fresh, lines = taken(f"student.weights={donor}", 'student.init=["blocks.*.attn.*", "norm.*"]')
    for name in state:
        chosen = ".attn." in name or name.startswith("norm.")
        assert torch.equal(ours[name], (state if chosen else fresh)[name]), name
    assert "10 of" in lines[0]
    with pytest.raises(
        UserError, match=r"student\.init: 'blocks\.\*\.atn\.\*' matches no parameter .*; near: blocks\."
    ):
        taken(f"student.weights={donor}", 'student.init=["blocks.*.atn.*"]')


def test_what_does_not_fit_is_named(donor, tmp_path):
    with pytest.raises(UserError, match=r"does not fit .*: 12 missing \(blocks\.2\.norm1\.weight"):
        taken(f"student.weights={donor}", "student.depth=3")
    with pytest.raises(UserError, match=r"12 unexpected \(blocks\.1\..*(?s:.*)Take what fits, .* `student"):
        taken(f"student.weights={donor}", "student.depth=1")
    with pytest.raises(UserError) as raised:
        taken(f"student.weights={donor}", "student.depth=1")
    advice = str(raised.value).rpartition(" `")[2].removesuffix("`").replace("'", "")
    assert advice == 'student.init=["cls_token", "pos_embed", "patch_embed.*", "blocks.*", "norm.*", "head.*"]'
    ours, _, _ = taken(f"student.weights={donor}", "student.depth=1", advice)
    assert all(torch.equal(tensor, load_file(donor)[name]) for name, tensor in ours.items())
    with pytest.raises(UserError, match=r"blocks\.0\.mlp.*has shape|norm.*has shape|cls_token has shape"):
        taken(f"student.weights={donor}", "student.embed_dim=24")
    with pytest.raises(UserError, match="cannot be read as weights"):
        taken(f"student.weights={tmp_path / 'none.safetensors'}")
    (tmp_path / "bad.pth").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(UserError, match="refused: it is a pickle with more than tensors"):
        taken(f"student.weights={tmp_path / 'bad.pth'}")


def test_what_is_no_file_of_weights_is_said(tmp_path):
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    with pytest.raises(UserError, match=r"page\.pth: not a file of weights: neither safetensors nor"):
        taken(f"student.weights={tmp_path / 'page.pth'}")


def test_the_final_norm_of_another_pooling_is_new(donor):
    state = load_file(donor)
    ours, fresh, lines = taken(f"student.weights={donor}", "student.global_pool=avg", classes=5)
    new = {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert ours.keys() - state.keys() == {"fc_norm.weight", "fc_norm.bias"}
    for name, tensor in ours.items():
        assert torch.equal(tensor, (fresh if name in new else state)[name]), name
    assert lines[0].endswith("(a head of other classes and the final norm of another pooling)")


def test_pixels_are_normalized_as_the_weights_want_it(donor, tmp_path):
    def found(*settings):
        chosen = load_recipe("scratch", [*STUDENT, *settings]).student
        return normalization(chosen, file_of(chosen))

    half, mean, std = (0.5,) * 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert found() == found("student.model=vit_base_patch16_224.mae") == (half, half)
    assert found("student.model=vit_base_patch16_224.mae", "student.pretrained=true") == (mean, std)
    assert found("student.model=vit_base_patch16_224.mae", "student.pretrained=true", "student.mean=[0,0,0]")[0] == (
        0,
        0,
        0,
    )
    assert found("student.model=vit_base_patch16_224.mae", f"student.weights={donor}") == (half, half)
    save_file(load_file(donor), tmp_path / "bare.safetensors")
    bare = f"student.weights={tmp_path / 'bare.safetensors'}"
    assert found("student.model=vit_base_patch16_224.mae", bare) == (mean, std)


def test_a_student_s_file_says_how_its_pixels_were_normalized(world, donor, tmp_path):
    first = ["student.mean=[0.4,0.4,0.4]", "student.std=[0.2,0.2,0.2]", "optim.epochs=1"]
    run(world, tmp_path / "first", "scratch", *first)
    console = Quiet()
    given = f"student.weights={tmp_path / 'first' / 'last.safetensors'}"
    trainer.train(job(world, tmp_path / "second", "scratch", given, "optim.epochs=1"), console)
    assert "pixels: mean 0.4, std 0.2" in console.lines
    _, about = load_student(tmp_path / "second" / "last.safetensors")
    assert (about.mean, about.std) == ((0.4,) * 3, (0.2,) * 3)


class Hostile:
    def __reduce__(self):
        return print, ("ran",)


def test_timms_weights_or_a_clear_error_without_the_hub(monkeypatch, donor):
    create, asked = timm.create_model, []

    def hub(name, pretrained=False, **arguments):
        if not pretrained:
            return create(name, **arguments)
        asked.append(name)
        if len(asked) == 1:
            raise RuntimeError("no connection\nmore")
        torch.manual_seed(3)
        return create(name, embed_dim=48, depth=2, num_heads=3, img_size=64, patch_size=4)

    monkeypatch.setattr(timm, "create_model", hub)
    with pytest.raises(UserError, match=r"vit_tiny_patch16_224 could not be .*: no connection\n  Give a"):
        taken("student.pretrained=true")
    ours, fresh, lines = taken("student.pretrained=true")  # a thousand classes, 64x64
    assert not torch.equal(ours["blocks.0.attn.qkv.weight"], fresh["blocks.0.attn.qkv.weight"])
    assert torch.equal(ours["head.weight"], fresh["head.weight"])
    assert "new are head.weight, head.bias (a head of other classes)" in lines[0]


@pytest.mark.parametrize("more", [[], ["optim.layer_decay=0.7", "model_ema_decay=0.9"]])
def test_fine_tuning_leaves_what_is_frozen_bit_for_bit(world, donor, tmp_path, more):
    console, before = Quiet(), load_file(donor)
    settings = [u8(world), f"student.weights={donor}", 'student.freeze=["patch_embed.*", "blocks.0.*", "pos_embed"]']
    trainer.train(job(world, tmp_path / "run", "aal", *settings, *more, "optim.clip_grad=1"), console)
    after = load_file(tmp_path / "run" / "last.safetensors")
    for name in before:
        frozen = name.startswith(("patch_embed.", "blocks.0.")) or name == "pos_embed"
        assert torch.equal(before[name], after[name]) == frozen, name
        if more and frozen:
            assert torch.equal(weights(tmp_path / "run")[f"ema {name}"], before[name])
    assert any("frozen: " in line and "(15 tensors)" in line for line in console.lines)


def test_frozen_running_statistics_stay_and_frozen_everything_is_refused(world, tmp_path):
    model, _ = student()
    with pytest.raises(UserError, match="freezes the whole student; nothing is left to train"):
        freeze(model, ["*"], print)
    with pytest.raises(UserError, match=r"student\.freeze: 'block\.\*' matches no parameter"):
        freeze(model, ["block.*"], print)
    cnn = [
        "student.model=resnet10t",
        "student.patch_size=null",
        "student.embed_dim=null",
        "student.depth=null",
        "student.num_heads=null",
        "optim.epochs=1",
    ]
    run(world, tmp_path / "a", "scratch", *cnn, store=None)
    start = f"student.weights={tmp_path / 'a' / 'last.safetensors'}"
    run(world, tmp_path / "b", "scratch", *cnn, start, 'student.freeze=["conv1.*", "bn1.*", "layer1.*"]', store=None)
    before, after = (load_file(tmp_path / n / "last.safetensors") for n in "ab")
    assert torch.equal(before["bn1.running_mean"], after["bn1.running_mean"])
    assert torch.equal(before["layer1.0.bn1.running_var"], after["layer1.0.bn1.running_var"])
    assert not torch.equal(before["layer2.0.bn1.running_var"], after["layer2.0.bn1.running_var"])


def test_a_resumed_run_needs_its_first_weights_no_more(world, donor, tmp_path):
    copy = tmp_path / "first.safetensors"
    save_file(load_file(donor), copy)
    settings = [f"student.weights={copy}", "student.freeze=[patch_embed.*]", "optim.layer_decay=0.7"]
    result = run(world, tmp_path / "run", "scratch", *settings)
    copy.unlink()
    (tmp_path / "run" / "result.json").unlink()
    again = run(world, tmp_path / "run", "scratch", *settings, resume=True)
    assert again["top1"] == result["top1"]
