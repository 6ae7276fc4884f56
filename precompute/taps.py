"""Taps: named tensors read off a timm network. Teacher and student read through this one module.

It is also the one place that imports timm: where torch has no CUDA, the registry's torchvision may be built against
another torch and fail to import for two missing operators. Declaring them is enough, nothing here calls them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from storage.codecs import Values
from storage.errors import UserError, nearest


def _declare_torchvision_operators() -> Any:
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for operator in ("nms", "qnms"):
        with suppress(RuntimeError):  # a matching torchvision has declared them already
            library.define(  # type: ignore[no-untyped-call]
                f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
    return library


if not torch.version.cuda:
    _library = _declare_torchvision_operators()  # undeclared again when it is collected

import timm  # noqa: E402

__all__ = ["TAPS", "AttentionTaps", "Tap", "TappedTeacher", "attention_layers", "check_attention", "class_row",
           "cnn_stages", "prefix_roles", "resize_matrix", "timm"]  # fmt: skip


class About(NamedTuple):
    """What a tap gives: axes of one sample's tensor, how many of the last make a map, whether layers can be chosen."""

    axes: tuple[str, ...]
    maps: int
    layered: bool
    values: Values = "plain"


TAPS: dict[str, About] = {
    "activations": About(("channel", "y", "x"), 2, True),
    "q": About(("layer", "head", "token", "width"), 2, True),
    "k": About(("layer", "head", "token", "width"), 2, True),
    "class_row": About(("layer", "head", "token"), 1, True, "rows"),
    "class_token": About(("width",), 1, False),
    "logits": About(("class",), 1, False, "logits"),
}
ATTENTION = ("q", "k", "class_row")


@dataclass(frozen=True)
class Tap:
    """What to read: a tap, with layers (from 1; stages of a CNN) and, for activations, the side of their grid."""

    name: str
    layers: tuple[int, ...] | None = None
    grid: int | None = None


def check_tap(name: str) -> str:
    """The tap's name; UserError with the nearest one where there is no such tap."""
    if name not in TAPS:
        raise UserError(f"no tap is called {name!r}. {nearest(name, TAPS)}")
    return name


def takes_image_size(model: str) -> bool:
    """Whether a timm model is made for one image size, so that `create_model` takes `img_size`."""
    config = timm.get_pretrained_cfg(model.partition(".")[0])
    return config is not None and bool(config.fixed_input_size)


# ---------------------------------------------------------------------------------------------- attention


def attention_layers(model: nn.Module) -> list[nn.Module]:
    """The attention modules of a plain ViT, first layer first.

    Raises:
        UserError: the network has none whose queries and keys can be read, naming what it has instead.
    """
    name = type(model).__name__
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList) or not all(hasattr(b, "attn") for b in blocks):
        why = "its attention is windowed" if hasattr(model, "layers") else "it has no list of attention blocks"
        raise UserError(f"{name}: no attention rows over all tokens can be read off it: {why}")
    layers: list[nn.Module] = [getattr(block, "attn") for block in blocks]  # noqa: B009
    for i, layer in enumerate(layers, 1):
        missing = [part for part in ("q_norm", "k_norm", "attn_drop", "num_heads", "scale") if not hasattr(layer, part)]
        if missing:
            kind = f"{type(layer).__module__}.{type(layer).__name__}"
            raise UserError(
                f"{name}: layer {i} is a {kind}, whose queries and keys cannot be read (no {', '.join(missing)}); "
                "only plain softmax(q·k/√d) attention can be tapped"
            )
    return layers


def prefix_roles(model: nn.Module) -> tuple[str, ...]:
    """The role of each prefix token: `class`, `distillation` or `register`, in the order of the sequence."""
    count = int(getattr(model, "num_prefix_tokens", 0))
    roles = []
    if getattr(model, "cls_token", None) is not None:
        roles.append("class")
    if getattr(model, "dist_token", None) is not None:
        roles.append("distillation")
    return (*roles, *["register"] * (count - len(roles)))


def class_row(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """The class query's attention over all tokens, softmax(q₀·kᵀ·scale).

    Args:
        q: queries after their norm, `[B, H, N, d]`; token 0 is the class token.
        k: keys after their norm, `[B, H, N, d]`.
        scale: 1/√d of the layer.

    Returns:
        `[B, H, N]`, each row sums to one.
    """
    return torch.einsum("bhd,bhnd->bhn", q[:, :, 0] * scale, k).softmax(-1)


class AttentionTaps:
    """Reads q and k of chosen layers by hooks after their norms, with the attention kernel left in place.

    Args:
        model: a plain ViT.
        layers: which, from 1; all by default.

    After each forward pass `q` and `k` hold `[B, H, N, d]` for each chosen layer, with gradients where there are any.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int] | None = None) -> None:
        modules = attention_layers(model)
        self.layers = tuple(layers or range(1, len(modules) + 1))
        outside = [n for n in self.layers if not 1 <= n <= len(modules)]
        if outside:
            raise UserError(f"layer {outside[0]} was asked for; {type(model).__name__} has layers 1 to {len(modules)}")
        chosen = [modules[n - 1] for n in self.layers]
        self.scales = [float(getattr(m, "scale")) for m in chosen]  # noqa: B009
        self.heads = [int(getattr(m, "num_heads")) for m in chosen]  # noqa: B009
        self._q: dict[int, Tensor] = {}
        self._k: dict[int, Tensor] = {}
        self._handles = []
        for n, module in zip(self.layers, chosen, strict=True):
            for part, kept in (("q_norm", self._q), ("k_norm", self._k)):
                hook = functools.partial(_keep, kept, n)
                self._handles.append(getattr(module, part).register_forward_hook(hook))

    @property
    def q(self) -> list[Tensor]:
        """Queries of the last forward pass, a tensor a layer."""
        return [self._q[n] for n in self.layers]

    @property
    def k(self) -> list[Tensor]:
        """Keys of the last forward pass, a tensor a layer."""
        return [self._k[n] for n in self.layers]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._q.clear()
        self._k.clear()


def _keep(kept: dict[int, Tensor], number: int, module: nn.Module, args: Any, output: Tensor) -> None:
    kept[number] = output


def _keep_copy(kept: dict[int, Tensor], number: int, module: nn.Module, args: Any, output: Tensor) -> None:
    kept[number] = output.clone()  # a ResNet adds the shortcut to it in place


@contextmanager
def _unfused(layers: Sequence[nn.Module]) -> Iterator[None]:
    before = [getattr(layer, "fused_attn", None) for layer in layers]
    for layer in layers:
        layer.fused_attn = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer, fused in zip(layers, before, strict=True):
            layer.fused_attn = fused  # type: ignore[assignment]


def check_attention(model: nn.Module, images: Tensor, tolerance: float = 1e-4) -> float:
    """Contract 12: softmax(q·kᵀ·scale) of the tapped q and k is the attention that the network uses.

    Args:
        model: in eval mode.
        images: normalised, `[B, 3, H, W]`.
        tolerance: largest difference allowed, as a part of the largest attention of the layer.

    Returns:
        The largest relative difference found over all layers.

    Raises:
        UserError: they differ: rotary embeddings, relative positions or other biases act after the tap.
    """
    layers = attention_layers(model)
    used: dict[int, Tensor] = {}
    handles = []
    for n, layer in enumerate(layers, 1):
        handles.append(layer.attn_drop.register_forward_pre_hook(functools.partial(_keep_input, used, n)))  # type: ignore[union-attr]
    taps = AttentionTaps(model)
    worst = 0.0
    try:
        with torch.no_grad(), _unfused(layers):
            model(images)
        for n, (layer, q, k) in enumerate(zip(layers, taps.q, taps.k, strict=True), 1):
            kind = f"{type(model).__name__}: layer {n} ({type(layer).__module__}.{type(layer).__name__})"
            if n not in used:
                raise UserError(f"{kind}: the attention that it uses cannot be seen, so its taps cannot be checked")
            mine = (q @ k.transpose(-2, -1) * taps.scales[n - 1]).softmax(-1)
            if mine.shape != used[n].shape:
                raise UserError(f"{kind}: attention {tuple(used[n].shape)}, from q and k {tuple(mine.shape)}")
            error = float((mine - used[n]).abs().max() / used[n].abs().max())
            worst = max(worst, error)
            if not error <= tolerance:
                raise UserError(
                    f"{kind}: the attention recomputed from q and k differs from the one that the network uses by "
                    f"{error:.2g} of its largest value (allowed: {tolerance:g}); rotary embeddings, relative positions "
                    "or other biases act after the tap, so its attention cannot be stored"
                )
    finally:
        taps.remove()
        for handle in handles:
            handle.remove()
    return worst


def _keep_input(kept: dict[int, Tensor], number: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
    kept[number] = args[0]


# ---------------------------------------------------------------------------------------------- CNN activations


def cnn_stages(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of the last normalisation in each stage's last block, before the residual sum (`aal.tap: norm`).

    EfficientNet-B3 has seven stages with 24, 32, 48, 96, 136, 232 and 384 maps, ResNet-34 four.

    Raises:
        UserError: the network has no stages that are known here, or a stage without a normalisation over maps.
    """
    names = {module: name for name, module in model.named_modules()}
    found: list[tuple[str, nn.Module]] = []
    for stage in _stages(model):
        blocks = getattr(stage, "blocks", stage)
        last = list(blocks.children())[-1]
        norms = [m for m in _without_shortcuts(last) if isinstance(m, nn.BatchNorm2d | nn.GroupNorm)]
        if not norms:
            raise UserError(
                f"{type(model).__name__}: stage {names[stage]} has no batch or group normalisation to read maps after"
            )
        found.append((names[norms[-1]], norms[-1]))
    return found


def _stages(model: nn.Module) -> list[nn.Module]:
    blocks = getattr(model, "blocks", None)
    if isinstance(blocks, nn.Sequential) and all(isinstance(stage, nn.Sequential) for stage in blocks):
        return list(blocks)  # EfficientNet, MobileNet
    for names in (("layer1", "layer2", "layer3", "layer4"), ("s1", "s2", "s3", "s4")):  # ResNet, RegNet
        if all(hasattr(model, name) for name in names):
            return [getattr(model, name) for name in names]
    if isinstance(stages := getattr(model, "stages", None), nn.Sequential):
        return list(stages)
    raise UserError(
        f"{type(model).__name__}: it has no convolutional stages that are known here; activations need a CNN"
    )


def _without_shortcuts(block: nn.Module) -> Iterator[nn.Module]:
    yield block
    for name, child in block.named_children():
        if name not in ("downsample", "shortcut"):
            yield from _without_shortcuts(child)


@functools.lru_cache(maxsize=64)
def resize_matrix(size_in: int, size_out: int, antialias: bool = False) -> Tensor:
    """Bicubic resizing of one axis as a matrix f32 `[size_out, size_in]`, equal to `F.interpolate` to 1e-7.

    Two products with it are a hundred times faster in ONNX Runtime than its Resize.
    """
    # Along the rows of a whole image: with an image of one column, torch's antialiasing gives other weights.
    identity = torch.eye(size_in, dtype=torch.float64)[None, None]
    antialias = antialias and size_out < size_in
    rows = F.interpolate(identity, (size_in, size_out), mode="bicubic", align_corners=False, antialias=antialias)
    return rows[0, 0].T.contiguous().float()


# ------------------------------------------------------------------------------- the teacher as one module


class TappedTeacher(nn.Module):
    """A teacher from view images to its taps: resizing, normalisation, network and taps in one graph.

    Args:
        model: a timm network, in eval mode.
        taps: what to read, in the order of the outputs.
        view_size: S, the side of the view images.
        input_size: the side of the network's own input.
        mean: of the network's input, per channel, for pixels in [0, 1].
        std: likewise.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Sequence[Tap],
        view_size: int,
        input_size: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.model = model
        self.taps = tuple(taps)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        self.input_size = input_size
        self.resizes = view_size != input_size
        if self.resizes:
            self.register_buffer("resize", resize_matrix(view_size, input_size, True))
        self._stages: list[tuple[str, nn.Module]] = []
        self._kept: dict[int, Tensor] = {}
        self._attention: AttentionTaps | None = None
        self._grids: dict[tuple[int, int], str] = {}
        if any(tap.name in ATTENTION for tap in self.taps):
            everything = range(1, len(attention_layers(model)) + 1)
            wanted = {n for tap in self.taps if tap.name in ATTENTION for n in tap.layers or everything}
            self._attention = AttentionTaps(model, sorted(wanted))
        if any(tap.name == "class_row" for tap in self.taps) and "class" not in prefix_roles(model):
            raise UserError(f"{type(model).__name__}: it has no class token, so it has no class row")
        if any(tap.name == "class_token" for tap in self.taps) and "class" not in prefix_roles(model):
            raise UserError(f"{type(model).__name__}: it has no class token")
        if any(tap.name == "logits" for tap in self.taps) and not getattr(model, "num_classes", 1):
            raise UserError(f"{type(model).__name__}: it has no classifier, so it has no logits")
        if any(tap.name == "activations" for tap in self.taps):
            self._stages = cnn_stages(model)
            for n, (_, module) in enumerate(self._stages, 1):
                module.register_forward_hook(functools.partial(_keep_copy, self._kept, n))
            self._prepare_grids()

    @property
    def stages(self) -> list[tuple[str, nn.Module]]:
        """(name, module) of the stages that activations are read off."""
        return self._stages

    def _prepare_grids(self) -> None:
        """The matrices that bring each stage's maps to each grid, made outside of `forward` as constants."""
        with torch.no_grad():
            self.model(torch.zeros(1, 3, self.input_size, self.input_size))
        for n, kept in self._kept.items():
            if kept.ndim != 4 or kept.shape[-1] != kept.shape[-2]:
                raise UserError(f"{type(self.model).__name__}: stage {n} gives {tuple(kept.shape)}, no square maps")
            for grid in {tap.grid for tap in self.taps if tap.name == "activations"}:
                assert grid is not None
                name = f"grid_{kept.shape[-1]}_{grid}"
                self._grids[(n, grid)] = name
                if not hasattr(self, name):
                    self.register_buffer(name, resize_matrix(kept.shape[-1], grid))

    def prepare(self, images: Tensor) -> Tensor:
        """Normalised input `[B, 3, I, I]` from uint8 view images `[B, S, S, 3]`."""
        x = images.permute(0, 3, 1, 2).float() / 255
        if self.resizes:
            matrix = self.get_buffer("resize")
            x = (matrix @ x @ matrix.T).clamp(0, 1)
        return (x - self.get_buffer("mean")) / self.get_buffer("std")

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The taps' tensors, f32 `[B, …]`, of uint8 view images `[B, S, S, 3]`."""
        features = self.model.forward_features(self.prepare(images))  # type: ignore[operator]
        return tuple(self._read(tap, features) for tap in self.taps)

    def _read(self, tap: Tap, features: Tensor) -> Tensor:
        if tap.name == "logits":
            return self.model.forward_head(features)  # type: ignore[operator,no-any-return]
        if tap.name == "class_token":
            return features[:, 0]
        if tap.name == "activations":
            maps = []
            for n in tap.layers or range(1, len(self._stages) + 1):
                matrix = self.get_buffer(self._grids[(n, int(tap.grid or 0))])
                maps.append(matrix @ self._kept[n] @ matrix.T)
            return torch.cat(maps, 1)
        assert self._attention is not None
        chosen = [self._attention.layers.index(n) for n in tap.layers or self._attention.layers]
        q, k, scales = self._attention.q, self._attention.k, self._attention.scales
        if tap.name == "class_row":
            return torch.stack([class_row(q[i], k[i], scales[i]) for i in chosen], 1)
        return torch.stack([(q if tap.name == "q" else k)[i] for i in chosen], 1)
