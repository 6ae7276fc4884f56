"""Features of a frozen network: what it makes of labeled images, for k-NN and linear probes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from precompute.taps import prefix_roles
from student.evaluation.batches import evaluation_batches

if TYPE_CHECKING:
    import numpy as np

    from storage.shards.shard import Shard
    from student.evaluation.batches import Answers
    from student.models.files import StudentDescription

WIDE = 768  # width from which on DINO's linear probe reads the last block alone
BLOCKS = 4  # whose class tokens it reads of a narrower network

Reading = Callable[[nn.Module, Tensor], Tensor]  # network and pixels `[B, 3, S, S]` -> features `[B, D]`


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """Features f32 `[N, D]` with their labels, int64 `[N]`, in the order of the shards, on one device."""

    values: Tensor
    labels: Tensor


def gathered(
    answers: Answers, device: torch.device | str = "cpu", advance: Callable[[int], None] = lambda _samples: None
) -> Features:
    """The features that some network, or a store, gives batch by batch.

    Args:
        answers: features `[B, D]` with labels; at least one batch.
        device: where they are collected.
        advance: called with the number of samples done.
    """
    values, labels = [], []
    for part, known in answers:
        values.append(part.float().to(device))
        labels.append(known.to(device))
        advance(len(known))
    return Features(values=torch.cat(values), labels=torch.cat(labels))


@torch.no_grad()
def features_of(
    model: nn.Module,
    about: StudentDescription,
    shards: Sequence[Shard],
    read: Reading,
    *,
    chosen: Sequence[np.ndarray] | None = None,
    device: torch.device | str = "cpu",
    advance: Callable[[int], None] = lambda _samples: None,
) -> Features:
    """What a frozen network makes of labeled shards, each sample once, on its evaluation view.

    Args:
        model: on the device, in eval mode.
        about: how it is fed.
        shards: to read.
        read: `class_feature` or `probe_feature`.
        chosen: sorted indices of the samples of each shard that count; None for all.
        device: where the model is.
        advance: called with the number of samples done.

    Raises:
        UserError: a missing label, an image that cannot be decoded.
    """
    batches = (batch.to(device) for batch in evaluation_batches(shards, about.evaluation_policy, chosen=chosen))
    answers = ((read(model, batch.pixels(about.mean, about.std)), batch.labels) for batch in batches)
    return gathered(answers, device, advance)


def class_feature(model: nn.Module, pixels: Tensor) -> Tensor:
    """The class token after the final norm, `[B, D]`; what the classifier acts on where it does not read that token."""
    if _has_class_token(model):
        return class_token(model, pixels)
    features = model.forward_features(pixels)  # type: ignore[operator]
    return model.forward_head(features, pre_logits=True)  # type: ignore[operator,no-any-return]


def class_token(model: nn.Module, pixels: Tensor) -> Tensor:
    """The class token after the final norm, `[B, D]`, whatever the classifier reads."""
    tokens: Tensor = model.forward_features(pixels)  # type: ignore[operator]
    return tokens[:, prefix_roles(model).index("class")]


def probe_feature(model: nn.Module, pixels: Tensor) -> Tensor:
    """What DINO's linear probe reads, `[B, D]`, all after the final norm.

    Of a ViT narrower than 768 the class tokens of the last four blocks, of a wider one the last class token and the
    mean of the last patches; of other networks as `class_feature`.
    """
    if not _has_blocks(model):
        return class_feature(model, pixels)
    at, blocks = prefix_roles(model).index("class"), 1 if _is_wide(model) else min(BLOCKS, len(model.blocks))  # type: ignore[arg-type]
    _, layers = model.forward_intermediates(  # type: ignore[operator]
        pixels, indices=blocks, return_prefix_tokens=True, norm=True, output_fmt="NLC"
    )
    parts = [prefix[:, at] for _, prefix in layers]
    if _is_wide(model):
        parts.append(layers[-1][0].mean(1))
    return torch.cat(parts, 1)


def feature_text(model: nn.Module, read: Reading) -> str:
    """In words what is read off a network."""
    if not _has_class_token(model):
        return "pooled features, as the classifier reads them"
    if read is class_feature or not _has_blocks(model):
        return "class token after the final norm"
    if _is_wide(model):
        return "last class token and mean of the last patches, after the final norm"
    return f"class tokens of the last {min(BLOCKS, len(model.blocks))} blocks, after the final norm"  # type: ignore[arg-type]


def _has_class_token(model: nn.Module) -> bool:
    """Whether a network's classifier reads a class token: one that no loss acts on says nothing."""
    return "class" in prefix_roles(model) and getattr(model, "global_pool", None) == "token"


def _has_blocks(model: nn.Module) -> bool:
    """Whether the tokens after each block can be read off a network with a class token."""
    return _has_class_token(model) and hasattr(model, "blocks") and hasattr(model, "forward_intermediates")


def _is_wide(model: nn.Module) -> bool:
    return int(model.embed_dim) >= WIDE  # type: ignore[arg-type]
