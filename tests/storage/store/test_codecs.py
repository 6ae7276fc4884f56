"""Codecs: what is kept is as near as it says, and decodes alike on both sides without touching what it is given."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import UserError
from storage.store.codecs import check_codec
from storage.store.quantize import HalfOverflow
from tests.storage.helpers import decode, encode, layout
from tests.storage.store.values import CODECS, KINDS, SHAPE, kinds, seeds, values_of


def assert_within_half_a_step(values: np.ndarray, maps: int) -> None:
    """The promise of `u8`, with the rounding of a few f32 operations."""
    arrays = encode("u8", values, maps)
    scale, offset = (arrays["scale"][..., i].astype(np.float64)[(..., *(None,) * maps)] for i in (0, 1))
    assert np.isfinite(scale).all()
    assert np.isfinite(offset).all()
    error = np.abs(decode("u8", arrays).astype(np.float64) - values)
    slack = 4 * np.finfo(np.float32).eps * (np.abs(offset) + 255 * scale)
    assert (error <= scale / 2 + slack).all()


@given(kinds, seeds, st.sampled_from([1, 2, 3]))
@settings(max_examples=80)
def test_u8_is_within_half_a_step(kind, seed, maps):
    assert_within_half_a_step(values_of(kind, seed), maps)


@given(st.floats(-65504, 65504, width=32), st.lists(st.floats(-65504, 1.6e7, width=32), min_size=5, max_size=5))
@settings(max_examples=150)
def test_u8_is_within_half_a_step_for_any_numbers(first, others):
    assert_within_half_a_step(np.array([first, *others], np.float32).reshape(1, 6), 1)


def test_a_step_is_hardly_more_than_the_span_needs():
    values = values_of("normal")
    scale = encode("u8", values, 2)["scale"][..., 0].astype(np.float64)
    span = np.ptp(values.astype(np.float64), axis=(2, 3))
    assert (scale * 255 >= span).all()
    assert (scale * 255 <= span * 1.004).all()


def test_u8_uses_all_of_its_codes():
    data = encode("u8", values_of("normal"), 2)["data"]
    assert (data.min((2, 3)) == 0).all()
    assert (data.max((2, 3)) >= 254).all()


def test_maps_do_not_touch_each_other():
    values = values_of("a different size each")
    whole = decode("u8", encode("u8", values, 2))
    for n in range(SHAPE[0]):
        for c in range(SHAPE[1]):
            alone = decode("u8", encode("u8", values[n : n + 1, c : c + 1], 2))
            assert np.array_equal(alone[0, 0], whole[n, c])


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, 1024.0])
def test_a_constant_that_f16_holds_is_exact(value):
    values = np.full(SHAPE, value, np.float32)
    assert np.array_equal(decode("u8", encode("u8", values, 2)), values)


@pytest.mark.parametrize("values", [[-1e5, 0.0], [6e5, 6e5], [0.0, 3e7], [-65505.0, 0.0], [-1e38, 1e38]])
def test_u8_keeps_scale_and_offset_in_f32_where_f16_overflows(values):
    block = np.array([[0.0, 1.0], values], np.float32)
    with pytest.raises(HalfOverflow):
        encode("u8", block, 1)
    arrays = encode("u8", block, 1, wide=True)
    assert arrays["scale"].dtype == np.float32
    half = arrays["scale"][:, 0].astype(np.float64) / 2
    error = np.abs(decode("u8", arrays).astype(np.float64) - block).max(1)
    assert (error <= half + 1e-6 * np.abs(block).max(1)).all()
    assert layout("u8", (2,), 1, wide=True) == {"data": ("uint8", (2,)), "scale": ("float32", (2,))}


@given(kinds, seeds)
@settings(max_examples=20)
def test_f32_is_exact(kind, seed):
    values = values_of(kind, seed)
    assert np.array_equal(decode("f32", encode("f32", values, 2)), values)


def test_f32_keeps_every_bit():
    values = np.array([[0.0, -0.0, 1e-45, 3.4e38, np.inf, np.nan]], np.float32)
    assert decode("f32", encode("f32", values, 1)).tobytes() == values.tobytes()


@given(seeds)
@settings(max_examples=20)
def test_f16_is_exact_for_what_f16_holds(seed):
    bits = np.random.default_rng(seed).integers(0, 2**16, SHAPE, np.uint16).view(np.float16)
    values = np.where(np.isfinite(bits), bits, 0).astype(np.float32)
    assert np.array_equal(decode("f16", encode("f16", values, 2)), values)


def test_f16_rounds_to_nearest():
    values = values_of("normal")
    assert (np.abs(decode("f16", encode("f16", values, 2)) - values) <= np.abs(values) * 2**-11 + 2**-25).all()


@pytest.mark.parametrize("value", [65520.0, -7e4, 3e38])
def test_f16_refuses_what_it_cannot_hold(value):
    values = np.ones(SHAPE, np.float32)
    values[2, 1, 3, 0] = value
    with pytest.raises(UserError, match=r"codec f16 cannot hold .*\n  Use codec=f32"):
        encode("f16", values, 2)
    assert np.isfinite(decode("f16", encode("f16", np.full(SHAPE, 65504, np.float32), 2))).all()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_numpy_and_torch_decode_alike_bit_for_bit(codec, kind):
    if codec == "f16" and "huge" in kind:
        kind = "mostly offset"
    arrays = encode(codec, values_of(kind), 2)
    found = decode(codec, arrays)
    tensor = decode(codec, {name: torch.from_numpy(array) for name, array in arrays.items()})
    assert found.dtype == np.float32
    assert tensor.dtype == torch.float32
    assert found.shape == tuple(tensor.shape) == SHAPE
    assert found.tobytes() == tensor.numpy().tobytes()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("wide", [False, True])
def test_decoding_leaves_its_arrays_as_they_were(codec, wide):
    arrays = encode(codec, values_of("normal"), 2)
    if wide and "scale" in arrays:
        arrays["scale"] = arrays["scale"].astype(np.float32)
    before = {name: array.tobytes() for name, array in arrays.items()}
    decode(codec, arrays)
    assert {name: array.tobytes() for name, array in arrays.items()} == before
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    decode(codec, tensors)
    assert {name: tensor.numpy().tobytes() for name, tensor in tensors.items()} == before


@pytest.mark.parametrize("codec", CODECS)
def test_read_only_arrays_decode(codec):
    arrays = encode(codec, values_of("normal"), 2)
    expected = decode(codec, arrays)
    for array in arrays.values():
        array.flags.writeable = False
    assert np.array_equal(decode(codec, arrays), expected)


@pytest.mark.parametrize("codec", CODECS)
def test_encoding_leaves_the_values_as_they_were(codec):
    values = values_of("normal")
    before = values.tobytes()
    encode(codec, values, 2)
    assert values.tobytes() == before


@given(st.sampled_from(CODECS), kinds, seeds, st.sampled_from([1, 2, 3]))
@settings(max_examples=60)
def test_the_layout_is_what_encoding_makes(codec, kind, seed, maps):
    values = values_of(kind, seed)
    if codec == "f16":
        values = values.clip(-65504, 65504)
    arrays = encode(codec, values, maps)
    expected = layout(codec, SHAPE[1:], maps)
    assert {name: (array.dtype.name, array.shape[1:]) for name, array in arrays.items()} == expected
    assert {len(array) for array in arrays.values()} == {SHAPE[0]}


@pytest.mark.parametrize("codec", CODECS)
def test_samples_are_encoded_one_by_one(codec):
    values = values_of("a different size each")
    whole = encode(codec, values, 2)
    for i in range(len(values)):
        for name, array in encode(codec, values[i : i + 1], 2).items():
            assert array[0].tobytes() == whole[name][i].tobytes()


@pytest.mark.parametrize(("wrong", "near"), [("u16", "f16"), ("f33", "f32"), ("U8", "u8"), ("float32", "f32")])
def test_an_unknown_codec_names_the_nearest(wrong, near):
    with pytest.raises(UserError, match=rf"no codec is called '{wrong}'\n.*{near}"):
        check_codec(wrong)
    assert check_codec(near) == near
