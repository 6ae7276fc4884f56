"""timm's networks: made by name, with errors that say what to change; and what timm says of them before."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg
from torch import nn

from precompute.taps.own_network import build_network, config_of_own, takes
from storage.errors import UserError, first_line
from storage.objects.network_names import outside_timm
from storage.objects.weights_file import random_seed

# Arguments of `timm.create_model` that are not the network's: which weights it gets, and what is made in its place.
FACTORY_ARGUMENTS = {
    *inspect.signature(timm.create_model).parameters,
    *inspect.signature(build_model_with_cfg).parameters,
    *("device", "dtype", "feature_cls", "features_only", "in_chans", "out_indices", "pruned", "use_naflex"),
}


def create_timm_model(
    name: str, arguments: Mapping[str, Any], *, owner: str, hint: str = "", pretrained: bool = False
) -> nn.Module:
    """`timm.create_model`, whose errors are UserErrors; or a network of one's own, or torchvision's (`outside_timm`).

    Args:
        name: of the network.
        arguments: of `timm.create_model`.
        owner: opens the message, such as `teacher resnet34`.
        hint: what to do where the network cannot be made.
        pretrained: whether it gets the weights of the timm hub.
    """
    if outside_timm(name):
        return build_network(name, arguments, owner=owner, pretrained=pretrained)
    try:
        network: nn.Module = timm.create_model(name, pretrained=pretrained, **arguments)
    except Exception as error:  # timm and the hub raise many kinds
        problem = f"cannot be made with {dict(arguments)}" if arguments else "cannot be made"
        if pretrained:
            problem = f"the weights of {name} could not be downloaded from the timm hub"
        raise UserError(f"{owner}: {problem}: {first_line(error)}", hint=hint) from None
    return network


def constructor_arguments(network: nn.Module) -> set[str]:
    """The arguments that a network of timm can be made with, as far as its constructors name them."""
    own = [vars(cls)["__init__"] for cls in type(network).__mro__ if "__init__" in vars(cls)]
    return {name for init in own for name in inspect.signature(init).parameters} - FACTORY_ARGUMENTS - {"self", "args"}


def untrained(create: Callable[[], nn.Module], weights: str) -> nn.Module:
    """The network of a seed with timm's initial weights; torch's own generator stays as it was.

    Args:
        create: makes the network.
        weights: `random:SEED`.
    """
    seed = random_seed(weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return create()


def is_elsewhere(model: str) -> bool:
    """Whether a name is of a network outside timm: `hf-hub:USER/NAME` or `local-dir:FOLDER`."""
    return model.partition(":")[0] in ("hf-hub", "hf_hub", "local-dir")


def config_of(model: str) -> Mapping[str, Any] | None:
    """What timm knows of a name's weights (`input_size`, `mean`, `std` …); None where there is nothing.

    Raises:
        UserError: a network outside timm whose `config.json` could not be read.
        RuntimeError: timm has no such weights of this network.
    """
    if is_elsewhere(model):
        hint = "Give hf-hub:USER/NAME or local-dir:FOLDER, with a config.json that timm wrote."
        with torch.device("meta"):
            network = create_timm_model(model, {}, owner=f"teacher {model}", hint=hint)
        return config_of_own(network)
    config = timm.get_pretrained_cfg(model)
    return None if config is None else config.to_dict()


def takes_image_size(model: str) -> bool:
    """Whether a timm model is made for one image size, so that `create_model` takes `img_size`."""
    if outside_timm(model):
        return takes(model, "img_size")
    config = config_of(model if is_elsewhere(model) else model.partition(".")[0])
    return config is not None and bool(config.get("fixed_input_size"))
