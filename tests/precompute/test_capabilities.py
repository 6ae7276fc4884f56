"""What `pipeline teachers NAME` offers is what precompute takes, tap for tap, of real networks with weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import timm
import torch

from precompute.capabilities import offers_of
from precompute.results import TapOffer
from precompute.taps import TAPS
from precompute.teachers import teacher as teachers
from storage.errors import UserError
from storage.store.store import Store
from storage.testing import synthetic_shards
from tests.conftest import run_precompute
from tests.precompute.engine.clusters import SLOW

if TYPE_CHECKING:
    from pathlib import Path

# timm name -> taps that are known to be refused; the rest is offered.
ATTENDS = ("q", "k", "v", "class_row", "attention")
OF_TOKENS = (*ATTENDS, "tokens", "class_token")
NETWORKS: dict[str, set[str]] = {
    "test_vit": set(),
    "deit_tiny_distilled_patch16_224": set(),
    "vit_wee_patch16_reg1_gap_256": {"class_row", "class_token"},
    "vit_base_patch16_siglip_224": {"class_row", "class_token", "logits"},  # pools by attention
    "vit_small_patch16_dinov3": {"logits"},  # rotary embeddings
    "eva02_tiny_patch14_224": {"logits"},
    "test_vit_relpos": {"q", "k", "class_row", "class_token"},
    "beit_base_patch16_224": {"q", "k"},
    "cait_xxs24_224": {"q", "k", "attention"},  # two layers of class attention
    "pit_ti_224": {*OF_TOKENS},
    "swin_tiny_patch4_window7_224": {*OF_TOKENS},
    "nest_tiny": {*OF_TOKENS},  # its kernel is called with five axes, which the exporter does not know
    "test_resnet": {*OF_TOKENS},
    "test_convnext": {*OF_TOKENS},
}
HEAVY = (
    "test_vit",
    "test_vit_relpos",
    "cait_xxs24_224",
    "swin_tiny_patch4_window7_224",
    "nest_tiny",
    "vit_base_patch16_siglip_224",
    "beit_base_patch16_224",
    "vit_small_patch16_dinov3",
    "eva02_tiny_patch14_224",
    "vit_wee_patch16_reg1_gap_256",
    "deit_tiny_distilled_patch16_224",
    "pit_ti_224",
    "test_convnext",
)


@pytest.mark.parametrize("name", NETWORKS)
def test_taps_that_are_known_to_be_refused_are_not_offered(name: str) -> None:
    found = offers_of(name)
    assert found.refused.keys() == NETWORKS[name]
    assert found.taps.keys() == TAPS.keys() - NETWORKS[name]
    assert all(found.refused.values())


@pytest.mark.parametrize("name", [SLOW(name) if name in HEAVY else name for name in NETWORKS])
def test_each_tap_that_is_offered_is_stored_as_it_was_told_and_each_other_is_refused(name: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    found = offers_of(name, grid=8)
    torch.manual_seed(0)
    network = timm.create_model(name)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)  # biases that begin at zero would hide what they do
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    teacher = teachers.find_teacher(name, weights=str(tmp_path / "weights.safetensors"), teacher_name="teacher")
    shards = synthetic_shards(tmp_path / "data", shards=1, samples=2, classes=2)

    def make(taps: list[str]) -> dict[str, Any]:
        wishes = [f"{tap},grid=8" if tap == "activations" else tap for tap in taps]
        return run_precompute(tmp_path / "store", shards, teacher, wishes)

    for tap in found.refused:
        with pytest.raises(UserError):
            make([tap])
    made = make(list(found.taps))["targets"]
    store = Store.open(tmp_path / "store")
    for tap, target in zip(found.taps, made, strict=True):
        manifest = store.target(target)
        assert manifest.identity.tap == tap
        codec = manifest.codec
        told = TapOffer(shape=codec.shape, codec=codec.name, bytes=codec.sample_bytes)
        assert found.taps[tap] == told
