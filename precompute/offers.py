"""What a network could give, without its weights: taps, shapes and bytes, as `pipeline teachers NAME` shows them.

Each tap is read as precompute reads it, of a network on the meta device, which takes no memory and no time.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn

from precompute.export import read_taps, require_size
from precompute.taps import TAPS, Tap, TappedTeacher, takes_image_size
from precompute.targets import default_codec, require_kind
from precompute.teachers import about_weights, anatomy, resolve
from storage.codecs import Codec
from storage.errors import UserError, first_line
from storage.records import Record


def offers_of(name: str, input_size: int | None = None, grid: int = 14) -> dict[str, Any]:
    """Sizes of a teacher by its short name or any timm name, and what each tap would take.

    Args:
        name: as `--teacher` takes it.
        input_size: of its square input; by default that of its weights.
        grid: side of a CNN's activation maps.

    Returns:
        `model`, `input_size`, `mean`, `std`, `parameters`, `network` (`cnn`, `vit`, `other`), `layers`; `taps`:
        tap -> `shape` of one sample, default `codec`, `bytes` a view image; and `refused`: tap -> why precompute
        would refuse it.

    Raises:
        UserError: an unknown name, or a size that the network does not take.
    """
    model, size, network = bare(name, input_size)
    about, parts = about_weights(model, name), anatomy(network)
    require_size(network, size, f"{name}: {model}")
    taps, refused = {}, {}
    for tap, tapped in TAPS.items():
        try:
            shape = _shape(network, parts, Tap(tap, grid=grid if tap == "activations" else None), size, name)
        except UserError as error:
            refused[tap] = str(error)
            continue
        codec = Codec(default_codec(tap), shape, tapped.maps, tapped.axes, tapped.values)
        taps[tap] = {"shape": list(shape), "codec": codec.name, "bytes": codec.sample_bytes}
    return {
        "teacher": name, "model": model, "input_size": size, "mean": list(about["mean"]), "std": list(about["std"]),
        **{field: parts[field] for field in ("parameters", "network", "layers")}, "taps": taps, "refused": refused,
    }  # fmt: skip


def bare(name: str, input_size: int | None = None, device: str = "meta") -> tuple[str, int, nn.Module]:
    """timm's name, input size and network of a teacher, without its weights.

    Args:
        name: as `--teacher` takes it.
        input_size: of its square input; by default that of its weights.
        device: where its parameters are; on `meta` they take no memory and no time.

    Raises:
        UserError: an unknown name, or a size that the network does not take.
    """
    model, own = resolve(name)
    size = input_size or own or about_weights(model, name)["size"] or 224
    arguments = {"img_size": size} if takes_image_size(model) else {}
    try:
        with torch.device(device):
            network: nn.Module = timm.create_model(model, pretrained=False, **arguments)
    except Exception as error:  # timm raises many kinds
        raise UserError(f"teacher {name} with an input of {size}: cannot be made: {first_line(error)}") from None
    return model, size, network.eval()


def _shape(network: nn.Module, parts: Record, tap: Tap, size: int, name: str) -> tuple[int, ...]:
    """The shape of what a tap gives of one image. Raises UserError where precompute refuses it."""
    require_kind(name, parts, tap.name)
    module = TappedTeacher(network, [tap], size, size, (0.5,) * 3, (0.5,) * 3).to("meta").eval()
    (given,), _ = read_taps(module, torch.zeros(2, size, size, 3, dtype=torch.uint8, device="meta"), name)
    return tuple(given.shape[1:])
