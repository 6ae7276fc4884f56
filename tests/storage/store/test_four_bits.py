"""Codes of four bits: two a byte, a scale for each map, or for each group of 32 numbers of a vector."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.store.codecs import Codec
from storage.store.quantize import HalfOverflow, packed, unpacked
from tests.storage.store.values import kinds, seeds, values_of


@given(st.integers(1, 40), seeds)
@settings(max_examples=40)
def test_two_codes_a_byte_come_back_as_they_were(width: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 16, (3, 2, width), np.uint8)
    data = packed(codes)
    assert data.shape == (3, width)  # 2 · width codes
    assert np.array_equal(unpacked(data, (2, width)), codes)
    assert np.array_equal(unpacked(torch.from_numpy(data), (2, width)).numpy(), codes)
    first, last = codes.reshape(3, -1)[:, 0], codes.reshape(3, -1)[:, width]
    assert np.array_equal(data[:, 0], first | last << 4), "as docs/store-format.md says"


@pytest.mark.parametrize("maps", [1, 2])
@given(kinds, seeds)
@settings(max_examples=40, deadline=None)
def test_every_value_is_within_half_a_step(maps: int, kind: str, seed: int) -> None:
    values = values_of(kind, seed)
    codec = Codec("u4", values.shape[1:], maps)
    try:
        arrays = codec.encode(values)
    except HalfOverflow:
        arrays = codec.encode(values, wide=True)
    steps = arrays["scale"][..., :1].astype(np.float64)  # [5, 3, 1]; of vectors, whose width is 4, [5, 3, 4, 1, 1]
    steps = steps[..., None] if maps == 2 else steps[..., 0]
    error = np.abs(codec.decode(arrays).astype(np.float64) - values)
    rounding = np.abs(values).max() * 2e-7 + 1e-44
    assert (error <= steps / 2 * (1 + 1e-5) + rounding).all()


@pytest.mark.parametrize("width", [7, 32, 40, 64, 192])
def test_a_large_channel_of_a_vector_spoils_its_own_group_alone(width: int) -> None:
    values = np.random.default_rng(0).normal(size=(20, 5, width)).astype(np.float32)
    values[..., 3] *= 100
    codec = Codec("u4", values.shape[1:], 1, axes=("token", "width"))
    arrays = codec.encode(values)
    groups = -(-width // 32)
    assert arrays["scale"].shape == (20, 5, groups, 2)
    assert arrays["data"].shape == (20, -(-5 * width // 2))
    found = codec.decode(arrays)
    assert found.shape == values.shape
    for group in range(groups):
        part = slice(32 * group, 32 * group + 32)
        step = np.ptp(values[..., part], axis=-1, keepdims=True) / 15
        assert (np.abs(found - values)[..., part] <= step / 2 * 1.01 + 0.02 * step).all()
    if groups > 1:
        others = np.abs(found - values)[..., 32:].max()
        assert others < 0.3 < np.abs(found - values)[..., :32].max()


def test_a_vector_in_groups_takes_five_bits_a_number() -> None:
    assert Codec("u4", (1, 197, 192), 1).sample_bytes == 197 * 192 * 5 // 8
    assert Codec("u8", (1, 197, 192), 1).sample_bytes == 197 * (192 + 4)
    assert Codec("u8", (12, 3, 197, 64), 1).sample_bytes == 12 * 3 * 197 * (64 + 4)
