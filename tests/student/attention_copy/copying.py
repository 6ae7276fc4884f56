"""Students that copy attention, batches for them, and what commands answer about them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.cli import main
from storage.store.store import Store
from storage.testing import TINY_VIT
from storage.views.policy import policy
from student.data.stream import Stream
from student.models.build import build_student
from student.recipe.validate import validate
from student.training.distiller import Distiller, find_targets

if TYPE_CHECKING:
    from pathlib import Path

    from student.recipe import schema
    from tests.conftest import World

SIZES = {name: TINY_VIT[1][name] for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
TAPS = {"map": ["attention"], "q": ["q"], "k": ["k"], "v": ["v"], "qk": ["q", "k"]}
SAME = [f"student.{name}={value}" for name, value in {**SIZES, "model": TINY_VIT[0]}.items()]
DEPTH, HEADS = SIZES["depth"], SIZES["num_heads"]
VALIDATION = policy("deit", 32).evaluation


def recipe_of(copying: dict[str, Any], **more: Any) -> schema.Recipe:
    student = {"model": TINY_VIT[0], **SIZES, **more.pop("student", {})}
    content = {
        "student": student,
        "losses": {"crossentropy": {}},
        "attention_copy": copying,
        "stream": {"batch_size": 32},
    }
    return validate({**content, **more}, "test")


BANK = {"stream": {"batch_size": 32, "bank": {"policy": "deit"}}}


def distiller_of(
    world: World, place: Path, copying: dict[str, Any], *, teachers: bool = False, **more: Any
) -> tuple[Distiller, Stream]:
    """A student that copies, with new weights or with the teacher's, and batches for it."""
    recipe = recipe_of(copying, **{**BANK, **more})
    torch.manual_seed(3)
    model, _ = build_student(recipe.student, 3)
    if teachers:
        model.load_state_dict(load_file(world.weights["vit"]))
    store = Store.open(place)
    bank, given = find_targets(store, store.shard_ids(), recipe, model)
    distiller = Distiller(recipe, model, given, mean=(0.5,) * 3, std=(0.5,) * 3)
    ids = list(dict.fromkeys(one.id for several in given.values() for one in several))
    return distiller, Stream(world.shards, batch_size=32, store=store, targets=ids, bank=bank)


def logits_of(distiller: Distiller, stream: Stream) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = distiller.eval()(next(stream.epoch(0)))[0]
    return logits


def asked(capsys: Any, *words: Any, status: int = 0) -> Any:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, words), "--json"])
    said = capsys.readouterr()
    assert ended.value.code == status, said
    return json.loads(said.out)


def synthetic_png() -> bytes:
    import io

    from storage.rng import generator
    from storage.testing import synthetic_image

    held = io.BytesIO()
    synthetic_image(1, generator("copying")).save(held, "PNG")
    return held.getvalue()
