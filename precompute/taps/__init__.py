"""Taps: named tensors read off a timm network. Teacher and student read through this one package."""

from __future__ import annotations

from precompute.taps.activations import POSITIONS, At, cnn_stages, resize_matrix
from precompute.taps.attention import (
    AttentionTaps,
    attention_layers,
    attention_rows,
    attention_scores,
    class_row,
    class_scores,
    layer_grids,
    prefix_roles,
    token_blocks,
)
from precompute.taps.check_attention import check_attention
from precompute.taps.registry import ATTENTION, TAPS, Tap, TapInfo, check_tap
from precompute.taps.tapped_model import TappedTeacher
from precompute.taps.timm_import import create_timm_model, takes_image_size

__all__ = [
    "ATTENTION",
    "POSITIONS",
    "TAPS",
    "At",
    "AttentionTaps",
    "Tap",
    "TapInfo",
    "TappedTeacher",
    "attention_layers",
    "attention_rows",
    "attention_scores",
    "check_attention",
    "check_tap",
    "class_row",
    "class_scores",
    "cnn_stages",
    "create_timm_model",
    "layer_grids",
    "prefix_roles",
    "resize_matrix",
    "takes_image_size",
    "token_blocks",
]
