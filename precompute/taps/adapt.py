"""What other code reads off timm's networks, put onto networks that do not have it: features, head, maps, prefix."""

from __future__ import annotations

import contextlib
import functools
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from precompute.taps.own_network import config_of_own
from precompute.taps.probe import run_blank
from precompute.taps.tokens import prefix_roles, unknown_prefix, wrong_prefix
from storage.errors import UserError, did_you_mean, first_line

_METHODS = ("forward_features", "forward_head")


def adapt(
    network: nn.Module,
    *,
    size: int,
    owner: str,
    prefix: Sequence[str] | None = None,
    tap_modules: Sequence[str] = (),
) -> nn.Module:
    """Give a network what timm's have and it has not, and return it; its `forward` and its tensors stay.

    A network with `forward_features` and `forward_head` is read by these, as timm's are. Of another, what `forward`
    gives counts: logits where it is what a linear layer gives (that is the classifier, and its input the embedding),
    and `num_classes` is not 0; else the embedding.

    Args:
        network: of one's own, or torchvision's.
        size: side of its input.
        owner: opens the message of an error.
        prefix: roles of the tokens before the patches; None for what `num_prefix_tokens` says.
        tap_modules: names of the modules whose outputs are its maps.

    Raises:
        UserError: it does not take such images, gives no vectors, or has no such modules.
    """
    has = [name for name in _METHODS if hasattr(network, name)]
    if len(has) == 1:
        (missing,) = {*_METHODS} - {*has}
        raise UserError(
            f"{owner}: it has {has[0]} but no {missing}, so its features are unknown",
            hint="Return a wrapper module whose forward calls this network.",
        )
    linear = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    try:
        with _outputs(linear) as outputs:
            output = run_blank(network, size)
    except Exception as error:  # networks raise anything
        raise UserError(f"{owner}: it cannot take {size}x{size} RGB images: {first_line(error)}") from None
    about = {**config_of_own(network), "input_size": (3, size, size)}
    if not has:
        if not isinstance(output, Tensor) or output.ndim != 2:
            found = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
            message = f"{owner}: its forward gives {found}; expected one tensor [B, K], of logits or features"
            raise UserError(message)
        classes = getattr(network, "num_classes", None)
        head = next((name for name, value in outputs.items() if value is output), None) if classes != 0 else None
        _add(network, head, output)
        about |= {"classifier": head} if head is not None else {}
    elif not hasattr(network, "num_features"):
        network.num_features = _width(network, size, owner)  # type: ignore[assignment]
    network.default_cfg = network.pretrained_cfg = about  # type: ignore[assignment]
    network.own_prefix = _prefix(network, prefix)  # type: ignore[assignment]
    if tap_modules:
        modules = dict(network.named_modules())
        for name in tap_modules:
            if name not in modules:
                raise UserError(f"{owner}: it has no module {name!r}", hint=did_you_mean(name, [*modules][1:]))
        network.own_maps = tuple(tap_modules)  # type: ignore[assignment]
        network.forward_intermediates = types.MethodType(_forward_intermediates, network)  # type: ignore[assignment]
        run_blank(network, size, "forward_intermediates")  # raises what is wrong with them
    return network


def _width(network: Any, size: int, owner: str) -> int:
    """Width of what its head reads; the network stays as it was."""
    features: Any = run_blank(network, size, "forward_features")
    training = network.training
    try:
        with torch.no_grad():
            return int(network.eval().forward_head(features, pre_logits=True).shape[1])
    except TypeError as error:
        message = f"{owner}: its forward_head must take pre_logits, as timm's does: {first_line(error)}"
        raise UserError(message) from None
    finally:
        network.train(training)


@contextlib.contextmanager
def _outputs(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Any]]:
    """Name -> what the module gave last within this context."""
    outputs: dict[str, Any] = {}
    with contextlib.ExitStack() as hooks:
        for name, module in modules.items():
            note = functools.partial(outputs.__setitem__, name)
            hooks.enter_context(module.register_forward_hook(lambda _module, _args, output, note=note: note(output)))
        yield outputs


def _add(network: nn.Module, head: str | None, output: Tensor) -> None:
    """Give a network timm's methods; bound ones, as a copy of the network is to call itself."""
    classifier = network.get_submodule(head) if head is not None else None
    network.own_head = head  # type: ignore[assignment]
    width = classifier.in_features if isinstance(classifier, nn.Linear) else output.shape[1]
    for name, value in {"num_classes": 0 if head is None else output.shape[1], "num_features": width}.items():
        if not hasattr(network, name):
            setattr(network, name, value)
    for method in (_forward_features, _forward_head, _get_classifier):
        setattr(network, method.__name__[1:], types.MethodType(method, network))


def _forward_features(self: Any, x: Tensor) -> Tensor:
    """What the classifier reads, or without one what the network gives: `[B, D]`."""
    if self.own_head is None:
        return self(x)  # type: ignore[no-any-return]
    seen: list[Tensor] = []
    with self.get_submodule(self.own_head).register_forward_pre_hook(lambda _module, args: seen.append(args[0])):
        self(x)
    return seen[-1]


def _forward_head(self: Any, features: Tensor, pre_logits: bool = False) -> Tensor:
    """Logits of features, or the features."""
    if self.own_head is None:
        if pre_logits and self.num_classes:
            raise UserError(f"{type(self).__name__}: no linear layer gives its logits, so its embedding is not known")
        return features
    if pre_logits:
        return features
    return self.get_submodule(self.own_head)(features)  # type: ignore[no-any-return]


def _get_classifier(self: Any) -> nn.Module:
    return nn.Identity() if self.own_head is None else self.get_submodule(self.own_head)


def _prefix(network: nn.Module, given: Sequence[str] | None) -> tuple[str, ...] | None:
    """The roles of the tokens before the patches; None where nobody says them."""
    if given is not None:
        return tuple(given)
    if getattr(network, "num_prefix_tokens", None) is None:
        return None
    roles = prefix_roles(network)
    return roles if "class" in roles or not roles else ("class", *roles[1:])


def _forward_intermediates(self: Any, x: Tensor, *, output_fmt: str = "NCHW", intermediates_only: bool = False) -> Any:
    """Features and the maps `[B, C, H, W]` of the named modules, as timm's networks give them."""
    assert output_fmt == "NCHW"
    with _outputs({name: self.get_submodule(name) for name in self.own_maps}) as kept:
        features = self.forward_features(x)
    maps = [_map(name, kept.get(name), self.own_prefix) for name in self.own_maps]
    return maps if intermediates_only else (features, maps)


def _map(name: str, output: Any, prefix: tuple[str, ...] | None) -> Tensor:
    """What a module gives as maps. Raises UserError where it is none."""
    output = output[0] if isinstance(output, tuple) else output
    if not isinstance(output, Tensor):
        what = "it did not run" if output is None else f"it gives a {type(output).__name__}"
        raise UserError(f"module {name}: {what}; expected maps [B, C, H, W] or tokens [B, N, D]")
    if output.ndim == 4:
        return output.clone()  # what follows may change it in place
    if output.ndim != 3:
        raise UserError(f"module {name}: it gives {tuple(output.shape)}; expected [B, C, H, W] or tokens [B, N, D]")
    if prefix is None:
        raise unknown_prefix(f"module {name}: it gives {output.shape[1]} tokens")
    side = math.isqrt(max(0, output.shape[1] - len(prefix)))
    if side**2 != output.shape[1] - len(prefix):
        raise UserError(wrong_prefix(f"module {name}", output.shape[1], prefix))
    return output[:, len(prefix) :].mT.reshape(len(output), -1, side, side)
