"""Policies and views: one spelling a policy, draws that depend on their arguments alone, replayed anywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import UserError
from storage.rng import generator
from storage.store.banks import bank_manifest, policy_of
from storage.store.manifests import BankManifest
from storage.testing import synthetic_image
from storage.views.draw import draw_view
from storage.views.policy import NAMED, OPERATIONS_VERSION, policy
from storage.views.render import decode, render, signature
from storage.views.view import COLUMNS, INVALID, View
from tests.conftest import ROOT
from tests.storage.helpers import encoded, optional_features

# ---------------------------------------------------------------------------------------------- policies


@pytest.mark.parametrize(("name", "line"), NAMED.items())
def test_a_name_is_its_line(name, line):
    assert policy(name, 32, 5) == policy(line, 32, 5)
    assert policy(name, 32).line == line
    assert policy(name, 32).name == name
    assert policy(name, 32).bank.startswith(f"{name}-32-")


@pytest.mark.parametrize(
    "line", ["crop( .125 ) | flip", " crop(0.1250)|flip", "crop(1.25e-1)|flip ", "crop(+.125)|flip()", "\tlight"]
)
def test_every_spelling_of_a_policy_is_the_same_policy(line):
    assert policy(line, 32) == policy("light", 32)
    assert policy(line, 32).bank == policy("light", 32).bank


def test_zero_has_one_spelling():
    assert policy("crop(-0)|flip", 32) == policy("crop(0.0)|flip", 32)


@pytest.mark.parametrize(
    "line", ["resize", "resize|flip", "short(0.5)|center", "short(1)|center|flip", "crop(0)", "crop(1)|flip"]
)
def test_a_normal_line_is_its_own_normal_line(line):
    assert policy(line, 16).line == line
    assert policy(policy(line, 16).line, 16) == policy(line, 16)


REFUSED = {
    "no operation": ("", "no operation is called ''"),
    "unknown operation": ("corp(0.1)|flip", "'corp'\n.*Did you mean 'crop'"),
    "unknown name": ("ligth", "'ligth'\n.*Did you mean 'light'"),
    "operation in capitals": ("Resize", "Did you mean 'resize'"),
    "not in order": ("resize|erase(0.1)|flip", "each once and in this order"),
    "rrc the wrong way round": ("rrc(1,0.08)", "rrc.lo,hi. takes"),
    "rrc of nothing": ("rrc(0,1)", "rrc.lo,hi. takes"),
    "randaug too strong": ("resize|randaug(11,0.5)", "randaug.m,std. takes"),
    "erase of no part": ("resize|erase(0)", "erase.p. takes"),
    "mix of nothing": ("resize|mix(0,0)", "mix.mixup,cutmix. takes"),
    "mix of no number": ("resize|mix(nan,1)", "mix.mixup,cutmix. takes"),
    "too few arguments": ("crop|flip", r"crop takes 1 argument\(s\), found 0"),
    "too many arguments": ("short(1,2)|center", r"short takes 1 argument\(s\), found 2"),
    "an argument too many": ("resize(3)", r"resize takes 0 argument\(s\), found 1"),
    "no number": ("crop(x)|flip", "arguments are numbers"),
    "no number after a comma": ("crop(0.1,)|flip", "arguments are numbers"),
    "a bracket that does not close": ("crop(0.1|flip", "no operation"),
    "short too small": ("short(0.09)|center", r"short\(f\)"),
    "short too large": ("short(1.01)|center", r"short\(f\)"),
    "border too large": ("crop(1.5)", r"crop\(p\)"),
    "border below zero": ("crop(-0.1)", r"crop\(p\)"),
    "no number at all": ("crop(nan)", r"crop\(p\)"),
    "infinite": ("short(inf)|center", r"short\(f\)"),
    "no framing": ("flip", "must begin with"),
    "short without center": ("short(0.5)|flip", "must begin with"),
    "center without short": ("center", "must begin with"),
    "center before short": ("center|short(0.5)", "must begin with"),
    "flip first": ("flip|resize", "must begin with"),
    "flip twice": ("resize|flip|flip", "may follow flip, randaug, erase, mix, each once"),
    "two framings": ("resize|crop(0.1)", "may follow flip, randaug, erase, mix"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what):
    line, message = REFUSED[what]
    with pytest.raises(UserError, match=message):
        policy(line, 32)


@pytest.mark.parametrize(("size", "seed"), [(0, 0), (-1, 0), (4097, 0), (32, -1), (32, 2**63)])
def test_sizes_and_seeds_have_bounds(size, seed):
    with pytest.raises(UserError, match="expected"):
        policy("light", size, seed)
    policy("light", 4096, 2**63 - 1)


def test_the_bank_changes_with_line_size_and_seed():
    policies = [policy("light", 32), policy("resize|flip", 32), policy("light", 64), policy("light", 32, 1)]
    assert len({p.bank for p in policies}) == 4


def test_without_chance_the_seed_is_no_part_of_the_bank():
    for line in ("none", "eval", "short(1)|center"):
        assert not policy(line, 32).random
        assert policy(line, 32, 7).bank == policy(line, 32).bank
    for line in ("light", "crop(0.1)", "resize|flip"):
        assert policy(line, 32).random


def test_the_bank_changes_with_the_version_of_the_operations(monkeypatch):
    before = policy("light", 32).bank
    monkeypatch.setattr("storage.views.policy.OPERATIONS_VERSION", OPERATIONS_VERSION + 1)
    assert policy("light", 32).bank != before


@pytest.mark.parametrize("line", ["light", "eval", "none", "crop(0.3)"])
def test_the_policy_of_a_bank_is_read_back_from_its_manifest(line):
    drawn_from = policy(line, 48, 9 if policy(line, 48).random else 0)
    content = json.loads(json.dumps(bank_manifest(drawn_from).plain()))
    assert policy_of(BankManifest.model_validate(content)) == drawn_from


@pytest.mark.parametrize("line", ["light", "none", "resize|flip", "eval"])
def test_the_evaluation_view_leaves_nothing_to_chance(line):
    evaluation = policy(line, 48, 3).evaluation
    assert (evaluation.line, evaluation.size, evaluation.random) == ("short(1)|center", 48, False)


# ---------------------------------------------------------------------------------------------- draws

keys = st.text(max_size=8)
sizes = st.tuples(st.integers(1, 300), st.integers(1, 300))


@given(
    st.sampled_from(["light", "eval", "none", "crop(1)|flip"]),
    st.integers(0, 2**63 - 1),
    keys,
    st.integers(0, 99),
    sizes,
)
@settings(max_examples=60)
def test_a_draw_depends_on_its_arguments_alone(line, seed, key, view, size):
    first = draw_view(policy(line, 24, seed), key, view, size)
    np.random.default_rng().random()
    draw_view(policy(line, 24, seed), key, view + 1, size)
    assert draw_view(policy(line, 24, seed), key, view, size) == first


@given(keys, st.integers(0, 99), sizes)
@settings(max_examples=40)
def test_views_without_chance_are_all_the_same(key, view, size):
    for line in ("eval", "none", "short(0.3)|center"):
        assert draw_view(policy(line, 24, 1), key, view, size) == draw_view(policy(line, 24), "other", 0, size)


@given(keys, st.integers(0, 2**63 - 1), sizes)
@settings(max_examples=60)
def test_boxes_lie_within_the_image_and_shifts_within_the_border(key, seed, size):
    for line in ("light", "eval", "none", "crop(0.5)", "short(0.1)|center"):
        drawn = draw_view(policy(line, 24, seed), key, 0, size)
        left, top, right, bottom = drawn.box
        assert -1e-9 <= left < right <= size[0] + 1e-9
        assert -1e-9 <= top < bottom <= size[1] + 1e-9
        if line != "none":
            assert right - left == pytest.approx(bottom - top)
        border = {"light": 3, "crop(0.5)": 12}.get(line, 0)
        assert max(map(abs, drawn.shift)) <= border
        assert drawn.flip in ((False, True) if line == "light" else (False,))


def test_draws_differ_over_keys_views_and_seeds_and_take_all_values():
    light = policy("light", 32)
    over = {
        "views": [draw_view(light, "a", view, (40, 40)) for view in range(400)],
        "keys": [draw_view(light, f"{i}", 0, (40, 40)) for i in range(400)],
        "seeds": [draw_view(policy("light", 32, seed), "a", 0, (40, 40)) for seed in range(400)],
    }
    for views in over.values():
        assert {view.shift[0] for view in views} == {view.shift[1] for view in views} == set(range(-4, 5))
        assert 150 < sum(view.flip for view in views) < 250
        assert len({(view.shift, view.flip) for view in views}) > 100


def test_the_size_of_an_image_does_not_change_its_chance():
    light = policy("light", 32)
    for view in range(20):
        small, large = (draw_view(light, "a", view, size) for size in ((40, 30), (400, 500)))
        assert (small.shift, small.flip) == (large.shift, large.flip)


def test_generators_of_other_arguments_differ():
    arguments = [("a", 1), ("a", "1"), ("a1",), ("a", 1, None), ("a", [1]), (1, "a"), ("a", 1.5)]
    assert len({int(generator(*several).integers(2**62)) for several in arguments}) == len(arguments)
    assert generator("a", 1).integers(2**62) == generator("a", 1).integers(2**62)


coordinates = st.floats(-1e6, 1e6)


@given(
    st.tuples(coordinates, coordinates, coordinates, coordinates),
    st.tuples(st.integers(-4096, 4096), st.integers(-4096, 4096)),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=60)
def test_a_row_of_a_bank_is_its_view(box, shift, flip, valid):
    view = View(box, shift=shift, flip=flip, valid=valid)
    row = view.row()
    assert View.of(row) == view
    assert row.shape == (len(COLUMNS),)
    assert row.dtype == np.float64
    assert dict(zip(COLUMNS, row, strict=True))["flip"] == flip
    assert dict(zip(COLUMNS, row, strict=True))["partner"] == -1


def test_an_invalid_view_says_so_in_its_row():
    assert not View.of(INVALID.row()).valid
    assert INVALID.row()[COLUMNS.index("valid")] == 0
    assert len(set(COLUMNS)) == len(COLUMNS)


# ---------------------------------------------------------------------------------------------- contract 2


def signatures_of(images: list[bytes]) -> list[int]:
    """Of views of `light` and `eval` of some images."""
    return [
        signature(render(data, draw_view(policy(line, 24, 5), f"key {i}", view, decode(data).size), 24))
        for i, data in enumerate(images)
        for line in ("light", "eval")
        for view in range(2)
    ]


@pytest.mark.parametrize("setting", ["OMP_NUM_THREADS", "JSIMD_FORCENONE", "NPY_DISABLE_CPU_FEATURES"])
def test_replay_equals_record_in_another_process(tmp_path, setting):
    value = {"OMP_NUM_THREADS": "2", "JSIMD_FORCENONE": "1", "NPY_DISABLE_CPU_FEATURES": optional_features()}[setting]
    images = [
        encoded(synthetic_image(label, generator("child", label), size), kind)
        for label, size in enumerate([(40, 32), (61, 47), (33, 90)])
        for kind in ("PNG", "JPEG", "WEBP")
    ]
    (tmp_path / "images.json").write_text(json.dumps([data.hex() for data in images]))
    program = (
        "import json, sys\n"
        "from tests.storage.views.test_policy import signatures_of\n"
        "images = [bytes.fromhex(text) for text in json.load(open(sys.argv[1]))]\n"
        "print(json.dumps(signatures_of(images)))\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "images.json")],
        cwd=ROOT,
        env={**os.environ, setting: value},
        capture_output=True,
        check=True,
        text=True,
    )
    assert json.loads(child.stdout) == signatures_of(images)
    assert len(set(signatures_of(images))) > 20
