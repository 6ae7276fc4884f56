"""Taps: named tensors read off a network. Teacher and student read through this one package."""

from __future__ import annotations

from precompute.taps.activations import POSITIONS, At, cnn_stages, resize_matrix, stage_maps
from precompute.taps.adapt import adapt
from precompute.taps.attention import Attention, AttentionTaps, full
from precompute.taps.attention_layers import AttentionLayers, attention_layers
from precompute.taps.check_attention import check_attention
from precompute.taps.own_network import allow_network, config_of_own, given, not_given, takes, torchvision_config
from precompute.taps.probe import image_size, run_blank
from precompute.taps.registry import ATTENTION, TAPS, Tap, TapInfo, check_tap
from precompute.taps.tapped_model import TappedTeacher
from precompute.taps.timm_import import (
    FACTORY_ARGUMENTS,
    config_of,
    constructor_arguments,
    create_timm_model,
    takes_image_size,
    untrained,
)
from precompute.taps.tokens import prefix_roles, token_blocks

__all__ = [
    "ATTENTION",
    "FACTORY_ARGUMENTS",
    "POSITIONS",
    "TAPS",
    "At",
    "Attention",
    "AttentionLayers",
    "AttentionTaps",
    "Tap",
    "TapInfo",
    "TappedTeacher",
    "adapt",
    "allow_network",
    "attention_layers",
    "check_attention",
    "check_tap",
    "cnn_stages",
    "config_of",
    "config_of_own",
    "constructor_arguments",
    "create_timm_model",
    "full",
    "given",
    "image_size",
    "not_given",
    "prefix_roles",
    "resize_matrix",
    "run_blank",
    "stage_maps",
    "takes",
    "takes_image_size",
    "token_blocks",
    "torchvision_config",
    "untrained",
]
