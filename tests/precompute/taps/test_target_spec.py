"""Targets: what is asked for, in words; which bank a run belongs to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from precompute import record_targets
from precompute.bank_choice import settle
from precompute.record_targets import defaults, target_id, target_identity
from precompute.request import PrecomputeRequest
from precompute.taps import Tap
from precompute.taps.target_spec import TargetSpec, layer_numbers, parse_target
from storage.errors import IdentityError, UserError
from storage.store import banks
from storage.store.markers import Task
from storage.store.store import Store
from storage.views.policy import Policy, policy
from tests.conftest import World, run_precompute, teacher_of
from tests.manifests import teacher_manifest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from storage.store.manifests import TargetIdentity, TeacherManifest

CNN = teacher_manifest(id="cnn", network="cnn", layers=7)
VIT = teacher_manifest(id="vit", heads=3, prefix=["class"])
OTHER = teacher_manifest(network="other", layers=0)


def identity(wish: TargetSpec, manifest: TeacherManifest, size: int = 32) -> TargetIdentity:
    teacher: Any = type("AnyTeacher", (), {"id": "0" * 64, "name": manifest.id, "tap_modules": ()})
    return target_identity(teacher, manifest, wish, policy("light", size))


class TwoShards(Store):
    """A store that knows two shards, and takes every file for the first one."""

    def shard_ids(self) -> list[str]:
        return ["shard-1", "shard-2"]

    def recognize(self, url: str, known: Sequence[str]) -> Any:
        return SimpleNamespace(id="shard-1")


def store_with(folder: Path, *policies: Policy, shard: str = "shard-1") -> Store:
    """A store that says of a shard that it has a view under each of these policies."""
    store = TwoShards.create(folder)
    for one in policies:
        store.add(banks.bank_manifest(one))
        store.objects.create(f"done/{Task('bank', one.bank, shard, 0).name}", b"{}")
    return store


def chosen(store: Store, wanted: Policy, *given: str, new_bank: bool = False) -> Policy:
    teacher: Any = None
    fields = frozenset(given)
    policy, *_ = settle(
        store,
        PrecomputeRequest(
            shards=["shard.tar"], teacher=teacher, policy=wanted, policy_fields=fields, new_bank=new_bank
        ),
    )
    return policy


# ---------------------------------------------------------------------------------------------- wishes


@pytest.mark.parametrize(
    ("text", "wishes"),
    [
        ("activations", [TargetSpec("activations")]),
        ("activations,grid=8,codec=u8", [TargetSpec("activations", layers=None, grid=8, codec="u8")]),
        ("activations, layers=1:4+7 ,grid=14", [TargetSpec("activations", layers="1:4+7", grid=14)]),
        ("q,k,layers=last", [TargetSpec("q", layers="last"), TargetSpec("k", layers="last")]),
        ("codec=f32,class_row", [TargetSpec("class_row", layers=None, grid=None, codec="f32")]),
        ("activations,grid=8,at=block", [TargetSpec("activations", layers=None, grid=8, at="block")]),
        ("activations,antialias=true,at=norm", [TargetSpec("activations", antialias=True, at="norm")]),
        ("activations,native=false,codec=u4", [TargetSpec("activations", codec="u4", native=False)]),
        ("logits,class_token,codec=f16", [TargetSpec("logits", codec="f16"), TargetSpec("class_token", codec="f16")]),
    ],
)
def test_a_target_is_taps_with_options(text: str, wishes: list[TargetSpec]) -> None:
    assert parse_target(text) == wishes


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("activatons", "no tap is called 'activatons'\n  Did you mean 'activations'"),
        ("q,kk", "no tap is called 'kk'"),
        ("q,,k", "no tap is called ''"),
        ("activations,gird=8", "no option is called 'gird'\n  Did you mean 'grid'"),
        ("activations,codec=u9", "no codec is called 'u9'\n  Did you mean 'u4'"),
        ("q,grid=8", "only activations are resized to a grid"),
        ("activations,q,grid=8", "only activations are resized to a grid"),
        ("logits,layers=1", "logits has no layers to choose"),
        ("q,class_token,layers=1", "class_token has no layers to choose"),
        ("activations,grid=0", "grid=0: expected a number of patches a side"),
        ("activations,grid=-3", "grid=-3"),
        ("activations,grid=8x8", "grid=8x8"),
        ("activations,grid=1000", "grid=1000"),
        ("activations,at=blok", "at=blok: expected norm (a stage's last normalization), block"),
        ("activations,antialias=yes", "antialias=yes: expected true or false"),
        ("activations,native=1", "native=1: expected true or false"),
        ("tokens,native=true", "only activations are kept on their own sides"),
        ("class_row,at=block", "only activations are read at a place of their own"),
        ("q,antialias=true", "only activations are resized"),
        ("grid=8", "names no tap"),
        ("", "no tap is called ''"),
    ],
)
def test_what_is_not_a_target_is_refused_with_the_nearest(text: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_target(text)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        (None, (1, 2, 3, 4, 5, 6, 7, 8)),
        ("last", (8,)),
        ("3", (3,)),
        ("1:4", (1, 2, 3, 4)),
        ("1:4+8", (1, 2, 3, 4, 8)),
        ("8+1:2", (8, 1, 2)),
        ("8:8", (8,)),
    ],
)
def test_layers_count_from_one_with_both_ends(text: str | None, numbers: tuple[int, ...]) -> None:
    assert layer_numbers(text, 8, "vit") == numbers


@pytest.mark.parametrize("text", ["0", "9", "1:9", "0:3", "3+3", "1:4+2", "last+8", "4:1", "4:1+2", "1:999999999"])
def test_layers_that_are_not_there_or_named_twice_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"layers=.*: vit has layers 1 to 8, each named once"):
        layer_numbers(text, 8, "vit")


@pytest.mark.parametrize("text", ["", "x", "first", "-1", "1:", ":4", "1+", "1,2", "1.5", "1-4", "1" * 10])
def test_what_names_no_layers_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"layers=.*: expected last, a number, a range 1:4, or several joined by \+"):
        layer_numbers(text, 8, "vit")


# ---------------------------------------------------------------------------------------------- what teachers give


def test_a_cnn_gives_activations_on_a_sixteenth_of_the_view_by_default() -> None:
    assert defaults(CNN) == [TargetSpec("activations")]
    assert [identity(TargetSpec("activations"), CNN, size).grid for size in (224, 8)] == [14, 1]
    assert identity(TargetSpec("activations"), CNN, 224).codec == "u8"


def test_a_vit_gives_class_rows_and_the_class_token_by_default() -> None:
    assert defaults(VIT) == [TargetSpec("class_row"), TargetSpec("class_token")]
    assert identity(TargetSpec("class_row"), VIT).codec == "f16"


def test_a_network_that_is_neither_gives_the_maps_of_its_stages_by_default() -> None:
    assert defaults(OTHER) == [TargetSpec("activations")]
    hierarchical = teacher_manifest(network="other", layers=0, stages=4)
    assert (identity(TargetSpec("activations"), hierarchical).at, Tap("activations").at) == ("stage", "norm")
    assert identity(TargetSpec("activations"), hierarchical).layers == (1, 2, 3, 4)
    assert identity(TargetSpec("activations", at="stage"), VIT).layers == tuple(range(1, 13)), "recorded before stages"


def test_a_vit_without_a_class_token_gives_nothing_by_default() -> None:
    with pytest.raises(UserError, match=r"has no default targets\n  Give `target=TAP`"):
        defaults(teacher_manifest(prefix=["register"]))


@pytest.mark.parametrize(
    ("wish", "manifest", "says"),
    [
        (
            TargetSpec("activations", at="norm"),
            VIT,
            "at=norm needs a CNN with stages of blocks; at=stage reads maps of any",
        ),
        (TargetSpec("activations"), OTHER, "forward_intermediates gives no square maps of it"),
        (TargetSpec("q"), CNN, "teacher cnn has no attention over all tokens"),
        (TargetSpec("class_row"), CNN, "teacher cnn has no attention over all tokens"),
        (TargetSpec("q"), OTHER, "has no attention over all tokens"),
        (TargetSpec("q", layers="13"), VIT, "vit has layers 1 to 12"),
        (TargetSpec("activations", layers="8"), CNN, "cnn has layers 1 to 7"),
    ],
)
def test_a_teacher_is_not_asked_for_what_it_has_not(wish: TargetSpec, manifest: TeacherManifest, says: str) -> None:
    with pytest.raises(UserError) as caught:
        identity(wish, manifest)
    assert says in str(caught.value)


def test_of_a_ready_graph_the_tensors_say_where_maps_are_read() -> None:
    ready = teacher_manifest(id="graph", network="onnx", layers=0)
    with pytest.raises(UserError, match="at=block: the tensors of a ready graph are chosen by `tap_tensor=TAP=TENSOR`"):
        identity(TargetSpec("activations", tensors=("relu",), at="block"), ready)
    assert identity(TargetSpec("activations", tensors=("relu",), antialias=True), ready).antialias == "all"


def test_two_ways_to_say_the_same_target_are_one_target() -> None:
    assert identity(TargetSpec("q", layers="last"), VIT) == identity(TargetSpec("q", layers="12"), VIT)
    assert identity(TargetSpec("q", layers="1:12"), VIT) == identity(TargetSpec("q"), VIT)
    assert identity(TargetSpec("activations", layers=None, grid=2, codec="u8"), CNN) == identity(
        TargetSpec("activations"), CNN
    )


@pytest.mark.parametrize(
    "other",
    [
        TargetSpec("q", layers="1"),
        TargetSpec("k"),
        TargetSpec("q", codec="f32"),
        TargetSpec("class_row"),
        TargetSpec("q", layers="12+1:11"),
    ],
)
def test_another_tap_layer_order_or_codec_is_another_target(other: TargetSpec) -> None:
    teacher: Any = type("AnyTeacher", (), {"id": "0" * 64, "name": "vit"})
    ids = {target_id(teacher, identity(wish, VIT)) for wish in (TargetSpec("q"), other)}
    assert len(ids) == 2


def test_variants_of_activations_add_to_the_identity_and_leave_older_ids_as_they_are() -> None:
    teacher: Any = type("AnyTeacher", (), {"id": "0" * 64, "name": "cnn"})
    plain = identity(TargetSpec("activations", grid=2, native=False), CNN)
    assert plain.plain().keys() == {"teacher", "bank", "tap", "layers", "grid", "codec"}, "older stores have no more"
    assert target_id(teacher, plain) == "cnn-activations-g2-u8-5683c315"
    assert (Tap.of(plain).at, Tap.of(plain).antialias) == ("norm", False)
    for wish, added, named in (
        (TargetSpec("activations", grid=2), {"native": True}, "cnn-activations-g2-native-u8-"),
        (
            TargetSpec("activations", grid=2, at="block", native=False),
            {"at": "block"},
            "cnn-activations-block-g2-u8-",
        ),
        (
            TargetSpec("activations", grid=2, antialias=True, native=False),
            {"antialias": "all"},
            "cnn-activations-antialias-g2-u8-",
        ),
    ):
        other = identity(wish, CNN)
        assert other.plain() == {**plain.plain(), **added}
        assert target_id(teacher, other).startswith(named)
        tap = Tap.of(other)
        assert (tap.at, tap.antialias) == (wish.at or "norm", "all" if wish.antialias else False)
        assert tap.native is (wish.native is None)
    older = plain.model_copy(update={"antialias": True})
    assert target_id(teacher, older) == "cnn-activations-antialias-g2-u8-d5b1bfb3"
    assert target_id(teacher, older) != target_id(teacher, other), "a stage that is enlarged had other numbers"
    assert Tap.of(older).antialias is True


def test_vectors_and_maps_that_an_older_version_began_are_completed_as_they_were(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of several is enough: all of a run are in the older form then, as the same command would have made them."""
    store, vit, cnn = tmp_path / "S", teacher_of(world.weights, "vit"), teacher_of(world.weights, "cnn")
    with monkeypatch.context() as older:

        def as_before(_store: Any, request: Any, manifest: Any, specs: Any, policy: Any, _say: Any) -> list[Any]:
            return [target_identity(request.teacher, manifest, s, policy, request.grid, older=True) for s in specs]

        older.setattr(record_targets, "_identities", as_before)
        begun = run_precompute(store, world.shards[:1], vit, ["q,codec=u8"])["targets"]
        begun += run_precompute(store, world.shards[:1], cnn, ["activations,grid=8"])["targets"]
    opened = Store.open(store)
    assert [opened.target(id).maps for id in begun] == [2, 2]
    before = opened.array(begun[0]).compute()
    again = run_precompute(store, world.shards, vit, ["q,k,codec=u8"])["targets"]
    assert again[0] == begun[0]
    assert [opened.target(id).identity.scale for id in again] == [None, None]
    assert [opened.target(id).codec.layout()["scale"].shape for id in again] == [(3, 3, 2)] * 2, "of each head"
    found = opened.array(begun[0]).compute()
    assert found.shape[0] == 2 * len(before)
    maps = [f"activations,grid=8,codec={codec}" for codec in ("u8", "u4")]
    assert run_precompute(store, world.shards, cnn, maps)["targets"][0] == begun[1]
    newer = run_precompute(tmp_path / "new", world.shards[:1], vit, ["q,k,codec=u8"])["targets"]
    fresh = Store.open(tmp_path / "new")
    assert not {*newer} & {*again}
    tokens = fresh.target(newer[0]).sample_shape[-2]
    assert [fresh.target(id).codec.layout()["scale"].shape for id in newer] == [(3, 3, tokens, 2)] * 2
    assert np.abs(fresh.array(newer[0]).compute() - before).max() <= 0.02 * np.abs(before).max()


def test_a_target_of_another_bank_or_teacher_is_another_target() -> None:
    assert identity(TargetSpec("q"), VIT, 32) != identity(TargetSpec("q"), VIT, 64)
    other: Any = type("AnyTeacher", (), {"id": "1" * 64, "name": "vit", "tap_modules": ()})
    assert target_identity(other, VIT, TargetSpec("q"), policy("light", 32)) != identity(TargetSpec("q"), VIT)


def test_target_ids_say_what_they_are_and_manifests_hold_it(world: World) -> None:
    store = Store.open(world.store)
    manifest = store.target(world.targets["activations u8"])
    assert manifest.id.startswith("cnn-activations-g8-native-u8-")
    assert manifest.identity.plain() == {
        "teacher": teacher_of(world.weights, "cnn").id,
        "bank": next(iter(store.banks())),
        "tap": "activations",
        "layers": [1, 2, 3, 4],
        "grid": 8,
        "codec": "u8",
        "native": True,
    }
    assert [stage.channels for stage in manifest.stages] == [8, 12, 16, 24]
    assert manifest.sample_shape == (60, 8, 8)
    assert store.target(world.targets["q"]).identity.layers == (3,)


def test_manifests_say_how_well_the_codec_keeps_what_the_teacher_gave(world: World) -> None:
    store = Store.open(world.store)
    measured = {name: store.target(id).codec_errors for name, id in world.targets.items()}
    errors = {name: {codec: error for codec, error in known.items() if error} for name, known in measured.items()}
    assert errors["activations f32"]["f32"].plain() == {
        "relative": 0,
        "cosine": pytest.approx(1),
        "loss_error": 0,
        "gradient_cosine": pytest.approx(1),
    }
    assert errors["activations f32"] == errors["activations u8"], "every codec that fits, whichever was taken"
    for name, codec in (("activations u8", "u8"), ("class_row", "f16"), ("q", "f16")):
        assert 0 < errors[name][codec].relative < 0.01
        assert errors[name][codec].cosine == pytest.approx(1, abs=1e-4)
    assert errors["class_row"]["f16"].relative < 2**-11
    assert set(errors["class_row"]) == {"f16", "f32", "u8", "u4", "log8"}
    assert set(errors["logits"]) == {"f32", "f16", "u8", "u4", "topk20"}
    for name in ("class_row", "logits"):
        assert errors[name]["f32"].kl == pytest.approx(0, abs=1e-9)
        assert all(error.kl >= -1e-9 for error in errors[name].values())
    assert 0 < errors["class_row"]["log8"].kl < 1e-3


def test_targets_that_are_asked_for_together_share_one_graph(world: World) -> None:
    store = Store.open(world.store)
    graphs = {name: store.target(id).graph for name, id in world.targets.items()}
    assert len({graphs[name] for name in ("activations f32", "activations u8", "logits")}) == 1
    assert len({graphs[name] for name in ("class_row", "class_token", "q", "k")}) == 1
    outputs = [store.target(world.targets[name]).output for name in ("activations f32", "activations u8", "logits")]
    assert outputs == [0, 0, 1], "one tap with two codecs is one output of the graph"


def test_a_refused_wish_leaves_the_store_without_a_target(world: World, tmp_path: Path) -> None:
    for kind, wish in (("vit", "activations,at=norm"), ("cnn", "q"), ("cnn", "class_token")):
        with pytest.raises(UserError):
            run_precompute(tmp_path / kind, world.shards[:1], teacher_of(world.weights, kind), [wish])
        assert not Store.open(tmp_path / kind).targets()


# ---------------------------------------------------------------------------------------------- which bank


def test_a_store_without_views_of_the_shards_takes_what_is_wanted(tmp_path: Path) -> None:
    wanted = policy("light", 64, 3)
    assert chosen(store_with(tmp_path / "empty"), wanted) == wanted
    other = store_with(tmp_path / "other", policy("none", 32), shard="shard-2")
    assert chosen(other, wanted, "line", "size", "seed") == wanted


def test_nothing_given_takes_the_bank_that_is_there(tmp_path: Path) -> None:
    there = policy("crop(0.25)|flip", 48, 7)
    assert chosen(store_with(tmp_path, there), policy("light", 224)) == there


def test_what_is_given_and_agrees_takes_the_bank_that_is_there(tmp_path: Path) -> None:
    there = policy("light", 48, 7)
    assert chosen(store_with(tmp_path, there), policy("light", 224), "line") == there
    assert chosen(store_with(tmp_path, there), policy("light", 48), "line", "size") == there
    assert chosen(store_with(tmp_path, there), there, "line", "size", "seed") == there


@pytest.mark.parametrize(
    ("wanted", "given", "field", "expected", "found"),
    [
        (policy("none", 48, 7), "line", "view policy", "crop(0.125)|flip", "resize"),
        (policy("light", 64, 7), "size", "view size", 48, 64),
        (policy("light", 48, 8), "seed", "seed", 7, 8),
    ],
)
def test_contract_5_another_policy_size_or_seed_is_refused_by_name(
    tmp_path: Path, wanted: Policy, given: str, field: str, expected: object, found: object
) -> None:
    store = store_with(tmp_path, policy("light", 48, 7))
    with pytest.raises(IdentityError) as caught:
        chosen(store, wanted, given)
    assert (caught.value.field, caught.value.expected, caught.value.found) == (field, expected, found)
    assert "`new_bank=True`" in str(caught.value)
    assert chosen(store, wanted, given, new_bank=True) == wanted
    assert chosen(store, wanted) == policy("light", 48, 7), "what was not said is no wish"


def test_a_seed_is_no_difference_where_nothing_is_left_to_chance(tmp_path: Path) -> None:
    there = policy("eval", 48)
    store = store_with(tmp_path, there)
    assert chosen(store, policy("light", 224, 5), "seed").bank == there.bank
    assert chosen(store, policy("eval", 48, 5), "line", "size", "seed").bank == there.bank


def test_of_several_banks_the_one_that_agrees_is_taken(tmp_path: Path) -> None:
    first, second = policy("light", 48), policy("eval", 64)
    store = store_with(tmp_path, first, second)
    assert chosen(store, policy("light", 64), "size").bank == second.bank
    assert chosen(store, policy("light", 224), "line").bank == first.bank
    with pytest.raises(IdentityError, match="view size"):
        chosen(store, policy("light", 96), "size")


def test_several_banks_that_agree_are_refused_by_name(tmp_path: Path) -> None:
    first, second = policy("light", 48), policy("light", 64)
    with pytest.raises(UserError) as caught:
        chosen(store_with(tmp_path, first, second), policy("light", 224), "line")
    assert first.bank in str(caught.value)
    assert second.bank in str(caught.value)
