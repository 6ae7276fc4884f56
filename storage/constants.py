"""Constants that several modules share."""

from __future__ import annotations

BLOCK = 64

# short name -> (timm name with its tag, input size that the papers use)
SHORT_NAMES: dict[str, tuple[str, int]] = {
    "effnet_b0": ("efficientnet_b0.ra_in1k", 224),
    "effnet_b3": ("efficientnet_b3.ra2_in1k", 224),
    "resnet34": ("resnet34.a1_in1k", 224),
    "resnet50": ("resnet50.a1_in1k", 224),
    "mobilenetv2": ("mobilenetv2_100.ra_in1k", 224),
    "regnety_160": ("regnety_160.deit_in1k", 224),
    "deit_s": ("deit_small_patch16_224.fb_in1k", 224),
    "deit_b": ("deit_base_patch16_224.fb_in1k", 224),
    "vit_tiny": ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", 224),
    "vit_s": ("vit_small_patch16_224.augreg_in21k_ft_in1k", 224),
    "vit_b": ("vit_base_patch16_224.augreg_in21k_ft_in1k", 224),
    "vit_l": ("vit_large_patch16_224.augreg_in21k_ft_in1k", 224),
    "mae_vit_b": ("vit_base_patch16_224.mae", 224),
    "mae_vit_l": ("vit_large_patch16_224.mae", 224),
    "dino_vit_s8": ("vit_small_patch8_224.dino", 224),
    "dino_vit_s16": ("vit_small_patch16_224.dino", 224),
}
