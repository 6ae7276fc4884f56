"""`teachers` and `recipes`: what they promise is what is recorded and read."""

from __future__ import annotations

import json

import pytest
import yaml

from pipeline.cli import main
from pipeline.recipes import loader
from precompute.capabilities import offers_of
from precompute.results import TapOffer
from storage.errors import UserError
from storage.store.store import Store


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([*words])
    said = capsys.readouterr()
    return int(str(ended.value.code)), said.out, said.err


@pytest.mark.parametrize(("name", "maps"), [("effnet_b3", 952), ("resnet34", 960), ("mobilenetv2", 712)])
def test_a_cnn_offers_the_maps_of_its_stages(name: str, maps: int) -> None:
    found = offers_of(name, grid=7)
    assert found.network == "cnn"
    assert found.taps["activations"] == TapOffer(shape=(maps, 7, 7), codec="u8", bytes=maps * (49 + 4))


def test_a_vit_offers_its_attention_and_no_memory_is_taken_for_it() -> None:
    found = offers_of("vit_l")
    assert (found.network, found.layers, found.parameters) == ("vit", 24, 304_326_632)
    assert found.taps["class_row"].shape == (24, 16, 197)
    assert found.taps["class_row"].bytes == 24 * 16 * 197 * 2
    assert offers_of("vit_tiny", 96).taps["attention"].shape == (12, 3, 37, 37)


@pytest.mark.slow
def test_what_is_offered_is_what_a_store_then_keeps(world) -> None:
    """The same shapes and bytes as those of targets that were made."""
    store = Store.open(world.store)
    teacher = store.teachers()["vit"]
    arguments = teacher.identity.arguments
    assert set(arguments) >= {"depth", "embed_dim"}, "the tiny teacher is timm's with other sizes"
    import timm

    create = timm.create_model
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(timm, "create_model", lambda name, **more: create(name, **{**more, **arguments}))
        taps = offers_of("vit_tiny", teacher.identity.input_size).taps
    made = {m.identity.tap: m for m in store.targets().values() if m.teacher == "vit"}
    assert len(made.keys() & taps.keys()) >= 4
    for tap in made.keys() & taps.keys():
        layers = made[tap].identity.layers
        expected = (len(layers), *taps[tap].shape[1:]) if layers else taps[tap].shape
        assert made[tap].sample_shape == expected, tap


def test_another_network_offers_its_maps_and_its_ends() -> None:
    assert set(offers_of("swin_tiny_patch4_window7_224").taps) == {"activations", "embedding", "logits"}


def test_an_unknown_teacher_is_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no teacher is called 'effnet_b33'\n  Did you mean 'effnet_b3'\?"):
        offers_of("effnet_b33")


def test_teachers_for_people_and_as_json(capsys) -> None:
    code, out, _ = run(capsys, "teachers")
    assert code == 0
    assert "effnet_b3     efficientnet_b3.ra2_in1k at 224" in out
    code, out, _ = run(capsys, "teachers", "effnet_b3", "--json")
    assert json.loads(out)["taps"]["activations"]["shape"] == [952, 14, 14]
    code, out, _ = run(capsys, "teachers", "effnet_b3")
    assert "952x14x14" in out
    assert "476.5 GiB" in out


def test_recipes_for_people_and_as_json(capsys) -> None:
    code, out, _ = run(capsys, "recipes")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[:-2]] == loader.names()
    assert "NAME-small" in out
    for name in (*loader.names(), "aal-small"):
        code, out, _ = run(capsys, "recipes", name)
        assert out.startswith(f"# {name.removesuffix('-small')}: ")
        assert yaml.safe_load(out)["losses"]
    code, out, _ = run(capsys, "recipes", "aal", "--json")
    assert json.loads(out)["settings"]["losses"]["aal"]["weight"]["start"] == 2000
    code, _, err = run(capsys, "recipes", "all")
    assert code == 1
    assert "no recipe is called 'all'. Did you mean 'aal'?" in err
