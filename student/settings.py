"""Settings that recipes share: weights over the epochs, teacher and target, alignment, the student, its bank."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

from storage.errors import setting


class ConfigModel(BaseModel):
    """Settings that refuse what they do not know and never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Schedule(ConfigModel):
    """A loss's weight over the 0-based epochs e.

    `exponential` (also a constant): `start · decay^e`, each break point in `then` beginning another decay. AAL's λ is
    `{start: 2000, decay: 0.99, then: {200: 0.98}}` = 2000 · 0.99^min(e, 200) · 0.98^max(0, e − 200).
    `linear`, `cosine`: from `start` to `end` over the epochs 0 to `over`, then `end`.
    Any of them is zero from epoch `until` on.
    """

    start: float
    shape: Literal["exponential", "linear", "cosine"] = "exponential"
    decay: float = Field(1.0, gt=0)
    then: dict[Annotated[int, Field(ge=0)], Annotated[float, Field(gt=0)]] = {}
    end: float | None = None
    over: int | None = Field(None, ge=1)
    until: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _whole(self) -> Schedule:
        if self.shape == "exponential":
            if self.end is not None or self.over is not None:
                raise ValueError("end and over belong to shape: linear or cosine")
        elif self.end is None or self.over is None:
            raise ValueError(f"shape {self.shape} needs end and over")
        elif self.decay != 1 or self.then:
            raise ValueError("decay and then belong to shape: exponential")
        return self

    def at(self, epoch: int) -> float:
        """The weight in an epoch."""
        if self.until is not None and epoch >= self.until:
            return 0.0
        if self.end is not None and self.over is not None:
            done = min(epoch / self.over, 1.0)
            if self.shape == "cosine":
                done = (1 - math.cos(math.pi * done)) / 2
            return self.start + (self.end - self.start) * done
        value, since, decay = self.start, 0, self.decay
        for point in sorted(self.then):
            if point >= epoch:
                break
            value *= decay ** (point - since)
            since, decay = point, self.then[point]
        return float(value * decay ** (epoch - since))


def _constant(value: Any) -> Any:
    if isinstance(value, str):  # YAML reads 1e3 as a word
        try:
            value = float(value)
        except ValueError:
            return value
    return {"start": value} if isinstance(value, int | float) and not isinstance(value, bool) else value


ATTENTION_COPY = "attention_copy"  # the section, and what its part of a run is called beside the losses


def settings_path(name: str) -> str:
    """The path of a loss's settings, or of attention copy."""
    return ATTENTION_COPY if name == ATTENTION_COPY else f"losses.{name}"


Weight = Annotated[Schedule, BeforeValidator(_constant)]


class LossConfig(ConfigModel):
    """What every loss says: its weight over the epochs."""

    weight: Weight = Schedule(start=1.0)
    type: str = ""


class TargetChoice(ConfigModel):
    """Which teacher or target, where the store has several."""

    teacher: str | None = None
    target: str | tuple[str, ...] | None = None


class TeacherLossConfig(TargetChoice, LossConfig):
    """What every loss with a teacher says: its weight, and which teacher or target."""


def _pairs(value: Any) -> Any:
    """A layer by itself stands for a pair of the same number."""
    return [[n, n] if type(n) is int else n for n in value] if isinstance(value, list | tuple) else value


Some = Annotated[str, Field(pattern="^(first|last)-[1-9][0-9]{0,2}$")]  # of layers

Layers = Annotated[Literal["last", "uniform"] | Some | tuple[tuple[int, int], ...], BeforeValidator(_pairs)]

FirstHeads = Literal["first"] | Annotated[str, Field(pattern="^first-[1-9][0-9]{0,2}$")]

AttentionTensors = Literal["map", "q", "k", "v", "qk"]

Average = Literal["none", "examples", "layers", "heads", "queries"]

HeadPairs = Annotated[tuple[tuple[int, int], ...], Field(min_length=1)]

HeadMap = Annotated[dict[int, HeadPairs], Field(min_length=1)]  # by the student's layer

Heads = Literal["auto", "mean", "sum", "max", "min", "log"] | FirstHeads | HeadPairs | HeadMap | None


class AlignmentConfig(TargetChoice):
    """How tokens of another depth, head count and grid meet; unstated mismatches are errors.

    layers: `last`, `uniform`, `first-N`, `last-N`, or pairs [student's layer, teacher's layer], from 1, where a number
    n stands for [n, n]; None: as many on both sides.
    heads: `mean`, `sum`, `max`, `min` (these two rescaled) or `log` over the heads of both sides, the `first` that both
    have, `first-N`, or pairs [student's head, teacher's head], from 1, also as a mapping from the student's layer;
    None: as many on both sides; `auto`: one to one where both have as many, else `log`.
    head_temperature: T of `log`; None: each side's number of heads.
    grid: `bicubic` resizes the teacher's patch part; None: the same grid on both sides.
    """

    layers: Layers | None = None
    heads: Heads = None
    head_temperature: float | None = Field(None, gt=0)
    grid: Literal["bicubic"] | None = None


class AlignedLossConfig(AlignmentConfig, TeacherLossConfig):
    """A loss on tokens that meet as `AlignmentConfig` says."""


class AttentionCopyConfig(AlignmentConfig):
    """What the student's layers take from the teacher in place of their own (student/attention_copy/copier.py).

    tensors: `map`: whole attention; `q`, `k`, `v`; `qk`: q and k, which give the map.
    average: maps are averaged over this before they are copied.
    """

    tensors: AttentionTensors = "map"
    average: Average = "none"
    heads: FirstHeads | None = None
    head_temperature: None = None

    @model_validator(mode="after")
    def _of_maps(self) -> AttentionCopyConfig:
        require_maps(self.tensors, average=self.average != "none")
        return self


def require_maps(tensors: AttentionTensors, **wished: bool) -> None:
    """ValueError where something is wished of maps and there are none."""
    for name, value in wished.items():
        if value and tensors != "map":
            raise ValueError(f"{name} applies to maps, and tensors={tensors} reads none")


class LinksConfig(ConfigModel):
    """Links that the paper's Algorithm 1 keeps of those of a trained run (student/losses/parts/aal_links.py).

    `loss` is the name of the run's aal loss, where it has several.
    """

    run: str
    loss: str | None = None
    normalize: Literal["abs", "printed"] = "abs"
    granularity: Literal["channel", "block"] = "channel"
    threshold: float = Field(0.05, ge=0, lt=1)


def _linked(value: Any) -> Any:
    return {"run": value} if isinstance(value, str) and value not in ("full", "alpha", "beta") else value


AllLinks = Literal["full", "alpha", "beta"] | LinksConfig | tuple[tuple[int, int] | None, ...]


class ProjectorLossConfig(TeacherLossConfig):
    """What losses on embeddings say of the projector to the teacher's width (student/losses/parts/projector.py).

    projector: `mlp`, or `linear` without GELUs.
    depth: its linear maps; 0: none, for a student as wide as its teacher.
    """

    projector: Literal["mlp", "linear"] = "mlp"
    depth: int = Field(4, ge=0, le=16)


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _three(value: Any) -> Any:
    return (value,) * 3 if isinstance(value, int | float) else value


Positive = Annotated[float, Field(gt=0)]


def number_in(value: Any) -> Any:
    """YAML takes 5e-4 for a word; people mean the number."""
    is_number = isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)e[+-]?\d+", value, re.IGNORECASE)
    return float(value) if is_number else value


def _arguments(value: Any) -> Any:
    """Arguments that are null are not said."""
    if not isinstance(value, dict):
        return value
    return {name: number_in(argument) for name, argument in value.items() if argument is not None}


Arguments = Annotated[dict[str, JsonValue], BeforeValidator(_arguments)]

Patterns = Annotated[tuple[str, ...], BeforeValidator(_listed)]


# Settings of a student that are arguments of the network.
SIZES = {"img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "global_pool"}
DROP_RATES = {"drop_path_rate", "drop_rate", "proj_drop_rate", "attn_drop_rate"}


class StudentConfig(ConfigModel):
    """The timm network that is trained, a ViT where losses read attention; what is None is the model's own default.

    `model` is a name of timm's, `FILE.py:FUNCTION` or `MODULE:FUNCTION`, whose code is run, or `torchvision/NAME`.
    `like` stands in its place: a teacher of the store, a short name or a timm name, whose architecture is taken with
    other sizes. `args` are further arguments of the network's constructor in timm, or of the function. There
    `pos_embed: sincos` is MAE's table of sines and cosines, which is not trained.
    `shifted_patches` sees each patch with four shifts of its image, which no bare timm model does.
    `pretrained` takes timm's weights, `weights` a file (safetensors or .pth, also a student's), `weights_key` one of
    several dictionaries of weights in it, by default the one that timm takes. `init` says which parameters are taken
    from them, `freeze` which are not trained: shell patterns over the names of a state dict, such as `blocks.*.attn.*`.
    A head of other classes is always new. Pixels are normalized by `mean` and `std`; None: as the given weights want it
    (their file's own, or timm's for the model), 0.5 without weights.
    """

    model: str = "vit_tiny_patch16_224"
    like: str | None = None
    img_size: int | None = Field(None, ge=4)
    patch_size: int | None = Field(None, ge=1)
    embed_dim: int | None = Field(None, ge=1)
    depth: int | None = Field(None, ge=1)
    num_heads: int | None = Field(None, ge=1)
    mlp_ratio: float | None = Field(None, gt=0)
    num_classes: int | None = Field(None, ge=1)
    global_pool: Literal["token", "avg", "map"] | None = None
    drop_path_rate: float | None = Field(None, ge=0, lt=1)
    drop_rate: float | None = Field(None, ge=0, lt=1)
    proj_drop_rate: float | None = Field(None, ge=0, lt=1)
    attn_drop_rate: float | None = Field(None, ge=0, lt=1)
    args: Arguments = {}
    shifted_patches: bool = False
    pretrained: bool = False
    weights: str | None = None
    weights_key: str | None = None
    init: Patterns = ("*",)
    freeze: Patterns = ()
    mean: Annotated[tuple[float, float, float] | None, BeforeValidator(_three)] = None
    std: Annotated[tuple[Positive, Positive, Positive] | None, BeforeValidator(_three)] = None

    @model_validator(mode="before")
    @classmethod
    def _one_architecture(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not (like := data.get("like")):
            return data
        if data.get("model", like) != like:
            raise ValueError(f"model and like are both given; choose one: {setting('student.like', 'null')}")
        return {**data, "model": like}

    @model_validator(mode="after")
    def _consistent(self) -> StudentConfig:
        for name in self.args:
            if name in type(self).model_fields:
                own = setting(f"student.{name}", self.args[name])
                raise ValueError(f"args.{name}: this has a setting of its own: {own}")
        if self.pretrained and self.weights:
            no_hub = setting("student.pretrained", "false")
            raise ValueError(f"pretrained and weights are both given; choose one: {no_hub}")
        if self.init != ("*",) and not (self.pretrained or self.weights):
            raise ValueError("init selects from given weights: set pretrained=true or weights=FILE")
        if self.weights_key is not None and not self.weights:
            raise ValueError("weights_key selects from a file of weights: set weights=FILE")
        return self

    @property
    def sizes(self) -> dict[str, Any]:
        """The settings that are arguments of the network, as far as they are given."""
        return self.model_dump(include=SIZES | DROP_RATES, exclude_none=True)


class BankChoice(ConfigModel):
    """Which bank of the store, or which policy fresh views are drawn from."""

    id: str | None = None
    policy: str | None = None
    size: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0)


# Students that errors propose: with a class token alone, and with none beside the patches.
WITH_CLASS, WITHOUT = "vit_tiny_patch16_224", "vit_base_patch16_gap_224"
