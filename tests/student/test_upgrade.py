"""What was recorded under the names of earlier versions is read under today's; what a user writes is not."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.recipes import loader
from storage.errors import UserError
from student.recipe.validate import validate
from student.upgrade import upgraded, upgraded_run

BEFORE = {
    "losses": {
        "crossentropy": {"method": "crossentropy"},
        "aal": {"method": "aal", "loss": "norm", "links": {"run": "R", "loss": "aal", "normalise": "printed"}},
        "advit": {"method": "advit", "distance": "kl", "tau": 2.0, "heads": "log", "temperature": 5.0},
        "rows": {"method": "advit", "distance": "l2", "tau": 1.0, "temperature": None},
        "maps": {"method": "attention", "what": "map", "heads": "log", "temperature": 3.0},
        "alignment": {"method": "alignment", "loss": "cosine"},
        "compress": {"method": "compress", "tau": 0.1},
        "ema": {"method": "deit", "kind": "soft", "tau": 3.0, "reduce": "batch"},
        "deit": {"method": "deit", "kind": "hard", "tau": 1.0, "reduce": "numel"},
        "features": {"method": "features", "temperature": None},
        "guidance": {"method": "guidance", "loss": "mse", "temperature": 4.0},
        "speed": {"method": "head_specific", "loss": "ce", "temperature": None},
        "seed": {"method": "seed", "tau_student": 0.3, "tau_teacher": 0.02},
    },
    "copying": {"what": "qk", "temperature": None, "layers": "last"},
    "optim": {"betas": [0.8, 0.9], "accumulate": 4, "lr": 0.5},
    "ema": 0.5,
    "stream": {"window": 2, "batch_size": 8},
    "speed": {"amp": "auto", "attention": "unfused", "compile": True},
}
TODAY = {
    "losses": {
        "crossentropy": {"type": "crossentropy"},
        "aal": {"type": "aal", "distance": "norm", "links": {"run": "R", "loss": "aal", "normalize": "printed"}},
        "advit": {"type": "advit", "distance": "kl", "temperature": 2.0, "heads": "log", "head_temperature": 5.0},
        "rows": {"type": "advit", "distance": "l2", "temperature": 1.0, "head_temperature": None},
        "maps": {"type": "attention", "tensors": "map", "heads": "log", "head_temperature": 3.0},
        "alignment": {"type": "alignment", "distance": "cosine"},
        "compress": {"type": "compress", "temperature": 0.1},
        "ema": {"type": "deit", "distillation_type": "soft", "temperature": 3.0, "reduction": "batchmean"},
        "deit": {"type": "deit", "distillation_type": "hard", "temperature": 1.0, "reduction": "mean"},
        "features": {"type": "features", "head_temperature": None},
        "guidance": {"type": "guidance", "distance": "mse", "head_temperature": 4.0},
        "speed": {"type": "head_specific", "distance": "ce", "head_temperature": None},
        "seed": {"type": "seed", "student_temperature": 0.3, "teacher_temperature": 0.02},
    },
    "attention_copy": {"tensors": "qk", "head_temperature": None, "layers": "last"},
    "optim": {"opt_betas": [0.8, 0.9], "grad_accum_steps": 4, "lr": 0.5},
    "model_ema_decay": 0.5,
    "stream": {"shuffle_blocks": 2, "batch_size": 8},
    "precision": {"amp_dtype": "auto", "fused_attn": False, "torchcompile": True},
}


def test_a_recipe_recorded_before_is_the_same_recipe_today():
    assert upgraded(BEFORE) == TODAY
    assert validate(upgraded(BEFORE), "before") == validate(TODAY, "today")


@pytest.mark.parametrize("name", loader.names())
def test_a_recipe_recorded_today_is_left_as_it_is(name):
    recorded = loader.load_recipe(name).model_dump(mode="json")
    assert upgraded(recorded) == recorded


def test_a_recipe_of_all_losses_recorded_today_is_left_as_it_is():
    recorded = validate(TODAY, "today").model_dump(mode="json")
    assert upgraded(recorded) == recorded


def test_what_a_run_recorded_has_today_s_names_and_losses_keep_theirs():
    targets = {"copying": ["a"], "speed": ["b"]}  # attention copy, and a loss that somebody called so
    state = {"meets.mine": 1}
    now = upgraded_run(
        {
            "recipe": BEFORE,
            "speed": {"amp": "none", "attention": "fused"},
            "copying": state,
            "identity": {"targets": targets, "views": 2},
            "targets": targets,
        }
    )
    assert now["recipe"] == TODAY
    assert now["precision"] == {"amp_dtype": "none", "fused_attn": True}
    assert now["attention_copy"] == state
    assert now["identity"] == {"targets": {"attention_copy": ["a"], "speed": ["b"]}, "views": 2}
    assert now["targets"] == now["identity"]["targets"]
    assert upgraded_run(now) == now


@pytest.mark.parametrize("nonsense", [None, 7, [], {"losses": 7}, {"losses": {"aal": None, "b": []}}, {"speed": "x"}])
def test_nonsense_is_left_for_those_who_check_it(nonsense):
    assert upgraded(nonsense) in (nonsense, {"precision": "x"})
    upgraded_run(nonsense)
    upgraded_run({"recipe": nonsense, "identity": nonsense, "speed": nonsense, "targets": nonsense})


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"optim": {"accumulate": 2}}, "optim.accumulate: no such setting. It is now 'optim.grad_accum_steps'"),
        ({"ema": 0.9}, "ema: no such setting. It is now 'model_ema_decay'"),
        ({"speed": {"amp": "auto"}}, "speed: no such setting. It is now 'precision.amp_dtype'"),
        ({"precision": {"compile": True}}, "precision.compile: no such setting. It is now 'precision.torchcompile'"),
        ({"copying": {"what": "q", "layers": "last"}}, "It is now 'attention_copy.tensors, attention_copy.layers'"),
        ({"losses": {"aal": {"loss": "mse"}}}, "losses.aal.loss: no such setting. It is now 'losses.aal.distance'"),
        (
            {"losses": {"x": {"type": "deit", "tau": 2}}},
            "losses.x.tau: no such setting. It is now 'losses.x.temperature'",
        ),
        ({"losses": {"aal": {"method": "aal"}}}, "losses.aal.method: no such setting. It is now 'losses.aal.type'"),
        ({"losses": {"x": {"method": "aal"}}}, "losses.x.method: no such setting. It is now 'losses.x.type'"),
        ({"losses": {"deit": {"reduction": "numel"}}}, "losses.deit.reduction: should be 'mean' or 'batchmean'"),
        ({"precision": {"fused_attn": "fused"}}, "precision.fused_attn: expected auto, true or false"),
    ],
)
def test_a_user_s_old_name_is_refused_and_today_s_is_named(written: dict[str, Any], message: str):
    with pytest.raises(UserError) as refused:
        validate({"losses": {"crossentropy": {}}, **written}, "recipe")
    assert message in str(refused.value)
