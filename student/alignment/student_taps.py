"""Tensors that losses read of a student beside its logits: attention, values, streams, final tokens, embedding.

Each loss names those that it reads (`Loss.student_taps`). Only these are kept, and the network is not changed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence, Set
from typing import Any, Literal, Self

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from precompute.taps import Attention, AttentionLayers, AttentionTaps, prefix_roles, run_blank, token_blocks
from storage.errors import UserError
from student.alignment.stages import StudentStage

StudentTap = Literal["labels", "logits", "attention", "values", "streams", "tokens", "embedding"]

ELSEWHERE: frozenset[StudentTap] = frozenset({"labels", "logits"})  # of the batch, and what the network gives by itself
OF_ANY: frozenset[StudentTap] = ELSEWHERE | {"embedding"}  # what every network has


class StudentTaps:
    """Tensors of a student's last forward pass within this context, with gradients where there are any.

    Args:
        model: the student.
        taps: which are kept: `attention`, `values` (v), `streams` (all tokens after each block; of a network without
            tokens the map after each stage), `tokens` (all tokens after the final norm), `embedding` (the class token
            of these; of a network that has none its pooled features). `labels` and `logits` are not read here.
        layers: the student's, where its attention or values are read (`StudentSpec.attention`).
        stages: of a student without tokens, where its maps are read (`StudentSpec.stages`).

    Raises:
        UserError: something cannot be read from this network.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Set[StudentTap],
        layers: AttentionLayers | None = None,
        stages: Sequence[StudentStage] = (),
    ) -> None:
        self._model, self._attention = model, AttentionTaps(())
        self._by_layer: dict[int, Tensor] = {}  # streams, or maps
        self._final: dict[str, Tensor] = {}  # tokens, and the pooled embedding
        self._class = class_index(model) if "embedding" in taps else None
        self._handles: list[RemovableHandle] = []
        self._modules = attention_modules(model)
        self._switched: list[nn.Module] = []
        if taps & {"attention", "values"}:
            assert layers is not None
            self._attention = AttentionTaps(layers.layers)
        if "streams" in taps and stages:
            for n, stage in enumerate(stages, 1):
                if stage.module is not None:
                    keep = functools.partial(_keep, self._by_layer, n, stage.vectors)
                    self._handles.append(stage.module.register_forward_hook(keep))
        elif "streams" in taps:
            blocks = token_blocks(model)
            if layers is not None and len(blocks) != len(layers.layers):
                raise UserError(
                    f"student {type(model).__name__}: of its {len(blocks)} blocks {len(layers.layers)} attend over all "
                    "tokens, so the tokens after its layers cannot be read"
                )
            for n, block in enumerate(blocks, 1):
                keep = functools.partial(_keep, self._by_layer, n, _whole)
                self._handles.append(block.register_forward_hook(keep))
        if "tokens" in taps or self._class is not None:
            token_blocks(model)  # raises where there are none
            if not isinstance(norm := getattr(model, "norm", None), nn.Module):
                raise UserError(f"student {type(model).__name__}: it has no final norm, so its tokens cannot be read")
            keep = functools.partial(_keep, self._final, "tokens", _whole)
            self._handles.append(norm.register_forward_hook(keep))
        if "embedding" in taps and self._class is None:
            self._handles.append(_keep_pooled(model, self._final))

    def __enter__(self) -> Self:
        if self._attention.layers:
            # Where the recipe wants no fused kernel, the taps compute without one: the network's own products would
            # hide q and k.
            self._switched = [module for module in self._modules if not module.fused_attn]
            self._attention.kernel = "unfused" if self._switched else "network"
            _set_fused(self._switched, True)
            self._attention.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._attention.layers:
            self._attention.__exit__(*error)  # type: ignore[no-untyped-call]
            _set_fused(self._switched, False)

    @property
    def attention(self) -> list[Attention]:
        """What each layer's attention was computed from."""
        return self._attention.attention

    def vectors(self, name: str) -> list[Float[Tensor, "B _H _N _d"]]:
        """Queries, keys or values as the kernel got them, a tensor a layer. Raises UserError: it got none."""
        vectors = [getattr(layer, name) for layer in self.attention]
        if any(tensor is None for tensor in vectors):
            kind = type(self._model).__name__
            raise UserError(f"student {kind}: it calls no attention kernel in some layer, so its {name} is not known")
        return vectors

    @property
    def streams(self) -> list[Float[Tensor, "B N D"]]:
        """The residual stream after each block."""
        return [self._by_layer[n] for n in sorted(self._by_layer)]

    @property
    def maps(self) -> dict[int, Float[Tensor, "B _P _C"]]:
        """Stage, from 1 -> its map, a vector for each of its places."""
        return self._by_layer

    @property
    def tokens(self) -> Float[Tensor, "B N D"]:
        """All tokens after the final norm."""
        return self._final["tokens"]

    @property
    def embedding(self) -> Float[Tensor, "B D"]:
        """The class token after the final norm; of a network without one its pooled features, as a classifier reads."""
        return self._final["pooled"] if self._class is None else self.tokens[:, self._class]

    def remove(self) -> None:
        """Take the hooks off the network."""
        for handle in self._handles:
            handle.remove()

    def clear(self) -> None:
        """Drop the tensors of the last forward pass, so that a compiled network is not compiled again for them."""
        self._attention.clear()
        self._by_layer.clear()
        self._final.clear()


def class_index(model: nn.Module) -> int | None:
    """Place of the class token among the tokens after the final norm; None where a network's embedding is pooled."""
    prefix = prefix_roles(model)
    if "class" not in prefix or not isinstance(getattr(model, "norm", None), nn.Module):
        return None
    try:
        token_blocks(model)
    except UserError:
        return None
    return prefix.index("class")


def embedding_width(model: nn.Module, size: int) -> int:
    """Width of a student's embedding.

    Args:
        model: any network; it runs once (`run_blank`).
        size: side of its input.

    Raises:
        UserError: what its classifier reads is not known, or no vector.
    """
    taps = StudentTaps(model, {"embedding"})
    try:
        run_blank(model, size)
        shape = tuple(taps.embedding.shape[1:])
    except KeyError:
        raise UserError(
            f"{type(model).__name__}: its classifier is not called, so its embedding is not known"
        ) from None
    finally:
        taps.remove()
    if len(shape) != 1:
        raise UserError(f"{type(model).__name__}: its embedding is of the shape {list(shape)}, not a vector")
    return shape[0]


def _keep_pooled(model: nn.Module, kept: dict[str, Tensor]) -> RemovableHandle:
    """Keep what a network's classifier gets; without a classifier that is what the network gives."""
    if not getattr(model, "num_classes", 0):
        return model.register_forward_hook(functools.partial(_keep, kept, "pooled", _first))
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else None  # type: ignore[operator]
    classifier = _first(classifier)  # of two heads
    if not isinstance(classifier, nn.Module):
        raise UserError(f"student {type(model).__name__}: it does not say what its classifier is (get_classifier)")
    return classifier.register_forward_pre_hook(functools.partial(_keep_input, kept))


def _keep(
    kept: dict[Any, Tensor], name: Any, read: Callable[[Any], Tensor], _m: nn.Module, _args: Any, out: Any
) -> None:
    kept[name] = read(out)


def _keep_input(kept: dict[str, Tensor], _module: nn.Module, args: Any) -> None:
    kept["pooled"] = args[0].flatten(1)  # before a classifier that is a convolution: (B, D, 1, 1)


def _whole(output: Tensor) -> Tensor:
    return output


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | list) else output


def _set_fused(modules: list[nn.Module], fused: bool) -> None:
    for module in modules:
        module.fused_attn = fused  # type: ignore[assignment]


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """Layers of a student with a fused and an unfused attention kernel, without those that copied maps keep unfused."""
    return [
        module
        for module in model.modules()
        if isinstance(getattr(module, "fused_attn", None), bool) and not getattr(module, "copies_maps", False)
    ]
