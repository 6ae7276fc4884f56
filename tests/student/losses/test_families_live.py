"""Contract 1 for attention that no hook on a module can read: rotary embeddings, and a bias on the scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from precompute.teachers.teacher import find_teacher
from storage.store.store import Store
from tests.conftest import run_precompute, write_teacher
from tests.student.losses.test_stored_equals_live import of_targets, recipe_of
from tests.typed import present

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import World

SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
MEETING = {"layers": "uniform", "grid": "bicubic"}


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "beit_base_patch16_224"])
def test_contract_1_attention_of_a_rotary_and_of_a_biased_teacher(name: str, world: World, tmp_path: Path) -> None:
    weights = write_teacher(tmp_path / "w.safetensors", (name, SIZES))
    state = load_file(weights)
    for tensor in (tensor for name, tensor in state.items() if name.endswith("relative_position_bias_table")):
        tensor.copy_(torch.randn_like(tensor))  # it begins nearly at zero
    save_file(state, weights)
    teacher = find_teacher(
        name,
        weights=weights,
        arguments={**SIZES, "num_classes": 3},
        input_size=32,
        mean=(0.5,),
        std=(0.5,),
        teacher_name="it",
    )
    asked = ["attention,codec=f32", "class_row,codec=f32"]
    attention, rows = run_precompute(tmp_path / "store", world.shards, teacher, asked)["targets"]
    store = Store.open(tmp_path / "store")
    assert present(store.target(attention).attention_error) <= 1e-5
    recipe = recipe_of(attention={**MEETING}, guidance={**MEETING})
    targets = {"attention": [attention], "guidance": [rows]}
    worst = of_targets(store, world.shards, {"it": teacher}, recipe, targets, 3, steps=10)
    for error, cosine in worst.values():
        assert error <= 1e-5
        assert cosine >= 1 - 1e-6
