"""A recorded teacher's network with a head of other classes, checked on real images against what the store keeps."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from precompute.taps import Tap, TappedTeacher, create_timm_model, takes_image_size, untrained
from storage.errors import IdentityError, UserError, call, setting
from storage.objects.checkpoint_file import EARLIER
from storage.objects.network_names import bare, outside_timm
from storage.objects.state_dict import HUB, ONNX_FILE, digest_of_state, load_weights
from storage.objects.weights_file import WeightsFile, is_random
from student.data.block_reader import BlockReader

if TYPE_CHECKING:
    from collections.abc import Sequence

    from storage.store.manifests import TeacherManifest
    from student.data.stream import Stream
    from student.fit_teacher.logistic_regression import Head

PARITY = 1e-4  # largest difference of logits ÷ their largest value, from the same features


def network_of(recorded: TeacherManifest, weights: str | None, classes: int) -> nn.Module:
    """A recorded teacher's network with its weights and a head for so many classes that is still to be filled.

    Args:
        recorded: the teacher's manifest.
        weights: a file, if not the recorded one.
        classes: K.

    Raises:
        UserError: the teacher is a ready graph, the file is not there, or it does not fit.
        IdentityError: it is another file than the teacher's.
    """
    name, owner, path = recorded.identity.model, f"teacher {recorded.id}", weights or recorded.weights
    if name == ONNX_FILE:
        raise UserError(
            f"{owner} is a ready graph ({recorded.weights}), and a head is fitted into a PyTorch network",
            hint=f"Precompute with its timm name and {setting('weights', 'F')}, then fit that one.",
        )
    if outside_timm(name):
        raise UserError(f"{owner}: a head is fitted into a network of timm, and {bare(name)} is none")
    arguments = arguments_of(recorded)
    if weights is None and path == HUB:  # the digest is of what the hub gives, whatever the size the teacher ran at
        from_timm = create_timm_model(name, recorded.identity.arguments, owner=owner, pretrained=True)
        _same_weights(f"{name} from timm's hub", recorded, digest_of_state(from_timm.state_dict()))
        own = create_timm_model(name, arguments, owner=owner, pretrained=True)
    elif is_random(path):
        own = untrained(functools.partial(create_timm_model, name, arguments, owner=owner), path)
        _same_weights(setting("weights", path), recorded, digest_of_state(own.state_dict()))
    else:
        if weights is None and not Path(path).expanduser().is_file():
            hint = f"Give them: {setting('weights', 'F')}"
            raise UserError(f"{owner}: its weights are no longer at {path}", hint=hint)
        file = WeightsFile(path)
        _same_weights(setting("weights", path), recorded, file.digest)
        own = create_timm_model(name, arguments, owner=owner)
        load_weights(own, file, recorded.identity.weights_key, EARLIER)
    model = create_timm_model(name, {**arguments, "num_classes": classes}, owner=owner)
    head = tuple(f"{part}." for part in heads_of(model))
    state = {n: t for n, t in own.state_dict().items() if not n.startswith(head)}
    absent = {n: t for n, t in model.state_dict().items() if n.startswith(head)}
    model.load_state_dict({**state, **absent}, strict=True)
    return model.eval().float().requires_grad_(False)


def arguments_of(recorded: TeacherManifest) -> dict[str, Any]:
    """What a recorded teacher's network is made of: its arguments, with the image size where it is made for one."""
    identity = recorded.identity
    sized = {"img_size": identity.input_size} if takes_image_size(identity.model) else {}
    return {**sized, **identity.arguments}


def _same_weights(where: str, recorded: TeacherManifest, digest: str) -> None:
    expected = recorded.identity.weights_sha256
    if digest != expected:
        hint = f"The features are those of the recorded teacher {recorded.id}."
        raise IdentityError(where, "weights sha256", expected, digest, hint)


def heads_of(model: nn.Module) -> list[str]:
    """The names of a network's classifiers: one, or two where it has a distillation token."""
    classifier = model.get_classifier()  # type: ignore[operator]
    modules = classifier if isinstance(classifier, tuple) else (classifier,)
    return [name for name, module in model.named_modules() if any(module is head for head in modules)]


def put_in(model: nn.Module, head: Head, teacher: str) -> None:
    """Fill a network's classifiers with a head; both of them where it has two, whose mean it then is.

    Raises:
        UserError: the classifier is no linear map of this many features.
    """
    for name in heads_of(model):
        part = model.get_submodule(name)
        linear = isinstance(part, nn.Linear) or (isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1))
        weight, bias = getattr(part, "weight", None), getattr(part, "bias", None)
        shape = tuple(weight.shape[:2]) if isinstance(weight, Tensor) else ()
        if not linear or shape != tuple(head.weight.shape) or not isinstance(bias, Tensor):
            raise UserError(
                f"teacher {teacher}: its classifier {name} is a {type(part).__name__} of shape {list(shape)}; a linear "
                f"head of {head.weight.shape[0]} classes over {head.weight.shape[1]} features cannot take its place"
            )
        weight.copy_(head.weight.reshape(weight.shape))  # type: ignore[union-attr]
        bias.copy_(head.bias)


def check(model: nn.Module, head: Head, stream: Stream, target: str, recorded: TeacherManifest) -> dict[str, float]:
    """How far the network's live logits of a real block are from the head on features, ÷ their largest value.

    Returns:
        head: on features that were read off at the same moment; stored: on those of the store, with its codec's error.

    Raises:
        UserError: the network's classifier does not act on this tap alone, or what is stored is not what is live.
    """
    tap = stream.source.store.target(target).identity.tap  # type: ignore[union-attr]
    module = tapped(model, [Tap(tap), Tap("logits")], stream, recorded)
    part, arrays = BlockReader(stream.source).read(stream.order.blocks[0], 0)
    with torch.no_grad():
        seen, logits = module(torch.from_numpy(part["images"]))
    codec = stream.source.targets[target]
    stored = torch.from_numpy(codec.decode(arrays[target]))
    largest = float(logits.abs().max())
    off = float((head.logits(seen) - logits).abs().max()) / largest
    if not off <= PARITY:
        hint = "This teacher cannot be given a linear head."
        if tap != "embedding":
            pooled = call("precompute", "…", target="embedding")
            hint = f"Take its pooled features: {pooled}, then {setting('target', 'ID')} of these"
        raise UserError(
            f"teacher {recorded.id}: its logits differ from a linear head on {tap} by {off:.2g} of the largest "
            f"(allowed: {PARITY:g}): its classifier does not act on {tap} alone",
            hint=hint,
        )
    rounded = torch.from_numpy(codec.decode(codec.encode(seen.numpy(), wide=True)))
    allowed = 2 * float((rounded - seen).abs().max()) + 1e-3 * float(seen.abs().max())
    error = float((stored - seen).abs().max())
    if not error <= allowed:
        raise UserError(
            f"target {target}: what is stored of {stream.source.shards[0].url} differs from what the network says now "
            f"by {error:.3g} (allowed for {codec.name}: {allowed:.3g})",
            hint=f"{call('verify')} compares all of it.",
        )
    return {"head": off, "stored": float((head.logits(stored) - logits).abs().max()) / largest}


def tapped(model: nn.Module, taps: Sequence[Tap], stream: Stream, recorded: TeacherManifest) -> TappedTeacher:
    """The network from a stream's view images to taps, with the preprocessing of precompute."""
    identity = recorded.identity
    size = stream.source.policy.size
    return TappedTeacher(model, taps, size, input_size=identity.input_size, mean=identity.mean, std=identity.std).eval()


class Classifier(nn.Module):
    """A teacher from pixels in [0, 1], `[B, 3, S, S]`, as `evaluate` gives them, to logits `[B, K]`."""

    def __init__(self, teacher: TappedTeacher) -> None:
        super().__init__()
        self.teacher = teacher

    def forward(self, pixels: Tensor) -> Tensor:
        """The logits."""
        logits: Tensor = self.teacher((pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1))[0]
        return logits
