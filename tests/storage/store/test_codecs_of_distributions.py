"""Codecs of distributions, and all codecs alike: log8 of probabilities, topk of logits, their errors and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import UserError
from storage.store.codecs import Codec, check_codec, codecs_for
from tests.storage.store.values import seeds, values_of

# ---------------------------------------------------------------------------------------------- log8


def rows_of_probabilities(seed: int, sharpness: float, shape: tuple[int, ...] = (4, 2, 3, 17)) -> np.ndarray:
    """Softmax of random scores, f32; the sharper, the more of it is almost or wholly zero."""
    scores = np.random.default_rng(seed).normal(size=shape) * sharpness
    exact = np.exp(scores - scores.max(-1, keepdims=True))
    probabilities: np.ndarray = exact / exact.sum(-1, keepdims=True)
    return probabilities.astype(np.float32)


def log8(shape: tuple[int, ...]) -> Codec:
    return Codec("log8", shape[1:], 1, axes=tuple(f"axis{i}" for i in range(len(shape) - 1)), values="rows")


def there_and_back(codec: Codec, values: np.ndarray) -> np.ndarray:
    decoded: np.ndarray = codec.decode(codec.encode(values))
    return decoded


@given(seeds, st.sampled_from([0.0, 0.1, 1.0, 3.0, 10.0, 60.0]))
@settings(max_examples=60)
def test_log8_is_within_half_a_step_of_each_entry(seed, sharpness):
    values = rows_of_probabilities(seed, sharpness)
    found = there_and_back(log8(values.shape), values).astype(np.float64)
    largest = values.max(-1, keepdims=True).astype(np.float64)
    kept = values >= largest * 2**-15.9
    bound = (2 ** (1 / 32) - 1) + 2**-11 + 1e-6  # half a step, and f16's rounding of the largest
    assert (np.abs(found - values)[kept] <= bound * values[kept]).all()
    assert (found[values <= largest * 2**-15.92] == 0).all()
    assert (found[values == 0] == 0).all()
    assert np.abs(found.max(-1, keepdims=True) - largest).max() <= 2**-11 * largest.max()


def test_log8_makes_zero_of_what_is_too_small_and_keeps_the_last_code_before_it():
    values = np.array([[1.0, 2**-15.85, 2**-15.95, 2**-40, 1e-42, 0.0]], np.float32)
    found = there_and_back(log8(values.shape), values)
    assert found[0, 1] == pytest.approx(2 ** (-254 / 16), rel=1e-6)
    assert found[0].tolist()[2:] == [0, 0, 0, 0]
    assert found[0, 0] == 1


@pytest.mark.filterwarnings("error")
def test_log8_keeps_rows_of_zeros_and_tiny_rows_without_a_warning():
    values = np.zeros((3, 2, 5), np.float32)
    values[1, 0, 2] = 1e-42
    values[2, 1] = [1e-9, 1.0, 1e-43, 0, 1e-38]
    found = there_and_back(log8(values.shape), values)
    assert (found[:2] == 0).all(), "f16 holds nothing so small"
    assert found[2, 1].tolist() == [0, 1, 0, 0, 0]
    assert log8(values.shape).error(values).kl >= 0


def test_log8_takes_largest_values_that_f16_rounds_down_or_up():
    chance = np.random.default_rng(0)
    values = chance.uniform(0, 1, (500, 1, 4)).astype(np.float32)
    found = there_and_back(log8(values.shape), values)
    assert (np.abs(found - values) <= 0.0224 * values).all()


@pytest.mark.parametrize("value", [-1e-6, -1.0])
def test_log8_refuses_what_is_no_probability(value):
    values = rows_of_probabilities(0, 1.0)
    values[1, 1, 2, 3] = value
    with pytest.raises(UserError, match=r"codec log8 keeps probabilities, found -.*\n  Use codec=f16"):
        log8(values.shape).encode(values)
    values[1, 1, 2, 3] = 7e4
    with pytest.raises(UserError, match="codec log8 cannot hold values up to 70000"):
        log8(values.shape).encode(values)


# ---------------------------------------------------------------------------------------------- topk


def topk(k: int, classes: int) -> Codec:
    return Codec(f"topk{k}", (classes,), 1, axes=("class",), values="logits")


def softmax(logits: np.ndarray) -> np.ndarray:
    exact = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    probabilities: np.ndarray = exact / exact.sum(-1, keepdims=True)
    return probabilities


def logits_of(seed: int, classes: int, spread: float = 3.0, count: int = 6) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(count, classes)) * spread).astype(np.float32)


@given(seeds, st.integers(2, 60), st.integers(1, 70), st.sampled_from([0.01, 1.0, 5.0, 30.0]))
@settings(max_examples=80)
def test_topk_keeps_its_classes_exactly_and_the_mass_of_all_others(seed, classes, k, spread):
    values = logits_of(seed, classes, spread)
    codec = topk(k, classes)
    arrays = codec.encode(values)
    found = codec.decode(arrays)
    index = arrays["index"].astype(np.int64)
    kept = np.take_along_axis(values, index, -1)
    assert codec.top == min(k, classes) == index.shape[-1]
    assert all(len(set(row)) == codec.top for row in index.tolist())
    assert np.array_equal(kept, np.sort(values, -1)[:, ::-1][:, : codec.top]), "the largest, largest first"
    assert np.array_equal(np.take_along_axis(found, index, -1), kept.astype(np.float16))
    exact, after = softmax(values), softmax(found)
    rest = 1 - np.take_along_axis(exact, index, -1).sum(-1)
    assert np.allclose(arrays["rest"][:, 0], rest, atol=1e-6)
    assert np.allclose(1 - np.take_along_axis(after, index, -1).sum(-1), rest, atol=3e-6)
    assert np.isfinite(found).all()
    if k < classes:
        others = np.ones_like(found, bool)
        np.put_along_axis(others, index, False, -1)
        assert (np.ptp(found[others].reshape(len(found), -1), axis=-1) == 0).all(), "one value for all others"


@pytest.mark.parametrize("k", [5, 6, 1000])
def test_topk_of_all_classes_is_exact_but_for_f16(k):
    values = logits_of(0, 5)
    codec = topk(k, 5)
    assert np.array_equal(there_and_back(codec, values), values.astype(np.float16).astype(np.float32))
    assert codec.layout()["data"].shape == (5,)


def test_topk_of_a_single_class():
    codec = topk(20, 1)
    values = np.array([[2.5], [-3.0]], np.float32)
    assert np.array_equal(there_and_back(codec, values), values)
    assert codec.error(values).kl == 0


def test_topk_takes_the_first_of_classes_that_are_alike():
    values = np.array([[1.0, 3.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0, 2.0]], np.float32)
    codec = topk(2, 5)
    arrays = codec.encode(values)
    assert arrays["index"].tolist() == [[1, 2], [0, 1]]
    assert np.allclose(softmax(codec.decode(arrays))[1], 0.2, atol=1e-6)
    assert np.allclose(softmax(codec.decode(arrays))[0, 1:3], softmax(values)[0, 1:3], atol=1e-6)


@pytest.mark.parametrize("gap", [50.0, 500.0, 60000.0])
def test_topk_of_a_teacher_that_is_sure_stays_finite(gap):
    values = np.array([[gap, 0.0, 0.0, -gap]], np.float32)
    for k in (1, 2, 3):
        found = there_and_back(topk(k, 4), values)
        assert np.isfinite(found).all()
        assert softmax(found)[0, 0] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("classes", "kind"), [(3, "uint16"), (1 << 16, "uint16"), ((1 << 16) + 1, "uint32"), (100_000, "uint32")]
)
def test_topk_numbers_its_classes_in_the_smaller_type_that_holds_them(classes, kind):
    values = np.zeros((1, classes), np.float32)
    values[0, -1] = 5
    codec = topk(2, classes)
    arrays = codec.encode(values)
    assert arrays["index"].dtype == kind == codec.layout()["index"].dtype
    assert arrays["index"][0].tolist() == [classes - 1, 0]
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    assert codec.decode(tensors)[0].argmax() == classes - 1 == codec.decode(arrays)[0].argmax()


def test_topk_refuses_logits_that_f16_cannot_hold():
    values = logits_of(0, 8)
    values[2, 3] = 7e4
    with pytest.raises(UserError, match=r"codec topk.* cannot hold values up to 70000\n  Use codec=f32"):
        topk(2, 8).encode(values)
    values[2, 3] = -7e4
    assert np.isfinite(there_and_back(topk(2, 8), values)).all(), "it is none of the largest"


def test_topk_costs_little_where_the_rest_is_little():
    values = logits_of(3, 1000, 4.0, 64)
    costs = [topk(k, 1000).error(values).kl for k in (1, 5, 20, 100, 999)]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] < 3
    assert costs[3] < 0.3
    assert costs[-1] < 1e-5


# ---------------------------------------------------------------------------------------------- both, and all

SOME = {
    "raw": (Codec("raw", (5, 5, 3), 2), np.random.default_rng(0).integers(0, 256, (4, 5, 5, 3), np.uint8)),
    "f32": (Codec("f32", (3, 4, 4), 2), values_of("normal")),
    "f16": (Codec("f16", (3, 4, 4), 2), values_of("normal")),
    "u8": (Codec("u8", (3, 4, 4), 2), values_of("normal")),
    "u4": (Codec("u4", (3, 4, 4), 2), values_of("normal")),
    "u4 of odd maps": (Codec("u4", (3, 3, 3), 2), values_of("normal")[:, :, 1:, 1:]),
    "u4 of vectors": (Codec("u4", (3, 4, 4), 1), values_of("normal")),
    "u4 of two groups": (Codec("u4", (40,), 1), logits_of(1, 40)),
    "log8": (log8((4, 2, 3, 17)), rows_of_probabilities(1, 2.0)),
    "topk3": (topk(3, 40), logits_of(1, 40)),
    "topk20 of few": (topk(20, 7), logits_of(1, 7)),
    "topk of many": (topk(4, 70_000), logits_of(1, 70_000, count=2)),
}


@pytest.mark.parametrize("name", SOME)
def test_the_bytes_of_a_sample_are_those_that_encoding_makes(name):
    codec, values = SOME[name]
    arrays = codec.encode(values)
    assert sum(array.nbytes for array in arrays.values()) == codec.sample_bytes * len(values)
    layout = codec.layout()
    assert {n: (a.dtype.name, a.shape[1:]) for n, a in arrays.items()} == {
        n: (part.dtype, part.shape) for n, part in layout.items()
    }
    assert all(len(part.axes) == len(part.shape) for part in layout.values() if codec.axes)


@pytest.mark.parametrize("name", [name for name in SOME if name != "raw"])
def test_every_codec_decodes_alike_on_both_sides_and_leaves_its_arrays_as_they_were(name):
    codec, values = SOME[name]
    arrays = codec.encode(values)
    before = {n: array.tobytes() for n, array in arrays.items()}
    found = codec.decode(arrays)
    tensors = {n: torch.from_numpy(array.copy()) for n, array in arrays.items()}
    tensor = codec.decode(tensors)
    assert found.dtype == np.float32
    assert tensor.dtype == torch.float32
    assert found.shape == tuple(tensor.shape) == values.shape
    assert np.allclose(found, tensor.numpy(), rtol=1e-6, atol=1e-6)
    assert np.array_equal(found == 0, tensor.numpy() == 0)
    assert {n: array.tobytes() for n, array in arrays.items()} == before
    assert {n: tensor.numpy().tobytes() for n, tensor in tensors.items()} == before
    for array in arrays.values():
        array.flags.writeable = False
    assert np.array_equal(codec.decode(arrays), found)


@pytest.mark.parametrize("name", [name for name in SOME if name[:4] in ("log8", "topk")])
def test_rows_are_encoded_one_by_one(name):
    codec, values = SOME[name]
    whole = codec.encode(values)
    for i in range(len(values)):
        for n, array in codec.encode(values[i : i + 1]).items():
            assert array[0].tobytes() == whole[n][i].tobytes()


def test_raw_keeps_view_images_as_they_are():
    codec, values = SOME["raw"]
    assert codec.encode(values)["data"].tobytes() == values.tobytes()
    assert codec.layout()["data"].dtype == "uint8"
    assert np.array_equal(codec.decode(codec.encode(values)), values)
    with pytest.raises(UserError, match="no codec is called 'raw'"):
        check_codec("raw")


@pytest.mark.parametrize("codec", ["log8", "topk", "topk5"])
@pytest.mark.parametrize("values", ["plain", "rows", "logits"])
def test_a_codec_for_other_values_is_refused_by_name(codec, values):
    if (codec[:4], values) in (("log8", "rows"), ("topk", "logits")):
        assert check_codec(codec, values) in codecs_for(values) or codec == "topk5"
        return
    with pytest.raises(UserError, match=rf"codec {codec} keeps .*(attention|logits)\n  Use f32, f16, u8 or u4"):
        check_codec(codec, values)


def test_the_full_name_of_topk_says_how_many():
    assert check_codec("topk") == "topk20"
    assert check_codec("topk7", "logits") == "topk7"
    assert codecs_for("plain") == ["f32", "f16", "u8", "u4"]
    assert codecs_for("rows") == ["f32", "f16", "u8", "log8", "u4"]
    assert codecs_for("logits") == ["f32", "f16", "u8", "topk20", "u4"]


@pytest.mark.parametrize("wrong", ["topk0", "topk-1", "topk07", "topk1000000", "top5", "topk5.0", "log", "log16"])
def test_misspelled_codecs_for_distributions_are_refused(wrong):
    with pytest.raises(UserError, match=f"no codec is called '{wrong}'"):
        check_codec(wrong)


@pytest.mark.parametrize("values", ["rows", "logits"])
def test_the_error_of_a_distribution_has_a_divergence_and_f32_costs_nothing(values):
    block = rows_of_probabilities(2, 3.0, (6, 2, 30)) if values == "rows" else logits_of(2, 30)
    costs = {}
    for name in codecs_for(values):
        codec = Codec(name, block.shape[1:], 1, values=values)
        error = costs[name] = codec.error(block)
        assert error.plain().keys() == {"relative", "cosine", "kl", "loss_error", "gradient_cosine"}
        assert error.kl >= -1e-12
    exact = pytest.approx(1, abs=1e-12)
    none = {"relative": 0, "cosine": exact, "kl": 0, "loss_error": 0, "gradient_cosine": exact}
    assert costs["f32"].plain() == none
    assert costs["f16"].kl < 1e-5
    if values == "rows":
        assert 0 < costs["log8"].kl < 1e-3
        assert costs["log8"].relative < 0.0224
    assert "kl" not in Codec("f16", block.shape[1:], 1).error(block).plain()
