"""What a recipe may say of each loss: its weight over the epochs, teacher, target, and the settings of its method."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Section(BaseModel):
    """Settings that refuse what they do not know and never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Schedule(Section):
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


Weight = Annotated[Schedule, BeforeValidator(_constant)]


class CrossEntropy(Section):
    """Cross-entropy with the labels (student/losses/crossentropy.py).

    `heads` is for students with a distillation token: the class head alone, or the mean over both heads; by default
    both, unless a `deit` loss trains the second one.
    """

    method: Literal["crossentropy"] = "crossentropy"
    weight: Weight = Schedule(start=1.0)
    smoothing: float = Field(0.0, ge=0, lt=1)
    heads: Literal["class", "both"] | None = None


class Weighted(Section):
    """How much a loss counts, over the epochs."""

    weight: Weight = Schedule(start=1.0)


class Source(Section):
    """Which teacher or target, where the store has several."""

    teacher: str | None = None
    target: str | tuple[str, ...] | None = None


class Taught(Source, Weighted):
    """What every loss with a teacher says: its weight, and which teacher or target."""


def _pairs(value: Any) -> Any:
    """A layer by itself stands for a pair of the same number."""
    return [[n, n] if type(n) is int else n for n in value] if isinstance(value, list | tuple) else value


Some = Annotated[str, Field(pattern="^(first|last)-[1-9][0-9]{0,2}$")]  # of layers
Layers = Annotated[Literal["last", "uniform"] | Some | tuple[tuple[int, int], ...], BeforeValidator(_pairs)]
FirstHeads = Literal["first"] | Annotated[str, Field(pattern="^first-[1-9][0-9]{0,2}$")]
What = Literal["map", "q", "k", "v", "qk"]
Average = Literal["none", "examples", "layers", "heads", "queries"]
HeadPairs = Annotated[tuple[tuple[int, int], ...], Field(min_length=1)]
HeadMap = Annotated[dict[int, HeadPairs], Field(min_length=1)]  # by the student's layer
Heads = Literal["auto", "mean", "sum", "max", "min", "log"] | FirstHeads | HeadPairs | HeadMap | None


class Meeting(Source):
    """How tokens of another depth, head count and grid meet (student/matching.py); unstated mismatches are errors.

    layers: `last`, `uniform`, `first-N`, `last-N`, or pairs [student's layer, teacher's layer], from 1, where a number
    n stands for [n, n]; None: as many on both sides.
    heads: `mean`, `sum`, `max`, `min` (these two rescaled) or `log` over the heads of both sides, the `first` that both
    have, `first-N`, or pairs [student's head, teacher's head], from 1, also as a mapping from the student's layer;
    None: as many on both sides; `auto`: one to one where both have as many, else `log`.
    temperature: T of `log`; None: each side's number of heads.
    grid: `bicubic` resizes the teacher's patch part; None: the same grid on both sides.
    """

    layers: Layers | None = None
    heads: Heads = None
    temperature: float | None = Field(None, gt=0)
    grid: Literal["bicubic"] | None = None


class Matched(Meeting, Taught):
    """A loss on tokens that meet as `Meeting` says."""


class Copying(Meeting):
    """What the student's layers take from the teacher in place of their own (student/copying.py).

    what: `map`: whole attention; `q`, `k`, `v`; `qk`: q and k, which give the map.
    average: maps are averaged over this before they are copied.
    """

    what: What = "map"
    average: Average = "none"
    heads: FirstHeads | None = None
    temperature: None = None

    @model_validator(mode="after")
    def _of_maps(self) -> Copying:
        _require_maps(self.what, average=self.average != "none")
        return self


def _require_maps(what: What, **wished: bool) -> None:
    for name, wish in wished.items():
        if wish and what != "map":
            raise ValueError(f"{name} is of maps, and with what={what} there are none")


class Links(Section):
    """Links that the paper's Algorithm 1 keeps of those of a trained run (student/links.py).

    `loss` is the name of the run's aal loss, where it has several.
    """

    run: str
    loss: str | None = None
    normalise: Literal["abs", "printed"] = "abs"
    granularity: Literal["channel", "block"] = "channel"
    threshold: float = Field(0.05, ge=0, lt=1)


def _linked(value: Any) -> Any:
    return {"run": value} if isinstance(value, str) and value not in ("full", "alpha", "beta") else value


AllLinks = Literal["full", "alpha", "beta"] | Links | tuple[tuple[int, int] | None, ...]


class AAL(Taught):
    """Adaptive attention links (student/losses/aal.py).

    `links`: all (`full`), those of the paper's Table 1 (`alpha`, `beta`), for each stage of the target its first and
    last layer (from 1; null for none), or what Algorithm 1 keeps of a run's (its folder). `grid` is the side of the
    maps that meet; None: the student's own.
    """

    method: Literal["aal"] = "aal"
    weight: Weight = Schedule(start=2000.0, decay=0.99, then={200: 0.98})
    map: Literal["scaled", "printed", "full"] = "scaled"
    loss: Literal["mse", "norm", "sq"] = "mse"
    links: Annotated[AllLinks, BeforeValidator(_linked)] = "full"
    grid: int | None = Field(None, ge=1)


class DeiT(Taught):
    """Distillation from logits (student/losses/deit.py)."""

    method: Literal["deit"] = "deit"
    kind: Literal["hard", "soft"] = "hard"
    tau: float = Field(1.0, gt=0)
    reduce: Literal["numel", "batch"] = "numel"
    same_classes: bool = Field(False, description="both lists of classes are the same, where one is not known")


class Attention(Matched):
    """Attention distillation (student/losses/attention_transfer.py): of maps, or of what makes them."""

    method: Literal["attention"] = "attention"
    what: What = "map"
    average: Average = "none"
    reduce_heads: Literal["mean", "sum"] = "mean"

    @model_validator(mode="after")
    def _of_maps(self) -> Attention:
        _require_maps(self.what, average=self.average != "none", reduce_heads=self.reduce_heads != "mean")
        return self


class Features(Matched):
    """Residual streams by their mean squared error (student/losses/features.py)."""

    method: Literal["features"] = "features"
    layers: Layers | None = "last"
    heads: None = None
    temperature: None = None
    projection: Literal["linear"] | None = None


class ADViT(Matched):
    """Class rows by their distance (student/losses/advit.py).

    `kl_input` says what the softmax of Eq. 4 acts on, for distances kl and ce; the other two belong to kl alone.
    """

    method: Literal["advit"] = "advit"
    distance: Literal["l1", "l2", "kl", "ce"] = "l1"
    heads: Heads = "mean"
    renorm: bool = Field(False, description="patch keys of each row are scaled to sum to one")
    kl_input: Literal["prob", "log-prob"] = "prob"
    kl_direction: Literal["teacher-first", "student-first"] = "teacher-first"
    tau: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _belongs(self) -> ADViT:
        if self.distance != "kl" and (self.tau != 1 or self.kl_direction != "teacher-first"):
            raise ValueError("tau and kl_direction belong to distance: kl")
        if self.distance not in ("kl", "ce") and self.kl_input != "prob":
            raise ValueError("kl_input belongs to distance: kl or ce")
        return self


class HeadSpecific(Matched):
    """Attention of chosen heads, one to one (student/losses/head_specific.py)."""

    method: Literal["head_specific"] = "head_specific"
    loss: Literal["mse", "mse-softmax", "ce", "kl"] = "mse"
    heads: FirstHeads | HeadPairs | HeadMap | None = "first"
    adaptive: Literal["none", "student-correct", "teacher-correct"] = "none"
    same_classes: bool = Field(False, description="as for deit; for adaptive: teacher-correct")


class Guidance(Matched):
    """Class rows by their divergence (student/losses/guidance.py).

    value_norm: each key's attention is weighted by the norm of its value, on both sides.
    """

    method: Literal["guidance"] = "guidance"
    weight: Weight = Schedule(start=0.1)
    layers: Layers | None = "last"
    heads: Heads = "auto"
    temperature: float | None = Field(10.0, gt=0)
    grid: Literal["bicubic"] | None = "bicubic"
    loss: Literal["kl", "mse"] = "kl"
    value_norm: bool = False


class Projected(Taught):
    """What losses on the class token say of the projector to the teacher's width (student/projector.py).

    projector: `mlp`, or `linear` without GELUs.
    depth: its linear maps; 0: none, for a student as wide as its teacher.
    """

    projector: Literal["mlp", "linear"] = "mlp"
    depth: int = Field(4, ge=0, le=16)


class Alignment(Projected):
    """The projected class token by its distance (student/losses/alignment.py).

    tokens: the `class` token, the `patches` (which need a `tokens` target), or `both`.
    grid: `bicubic` resizes the teacher's patches; None: the same grid on both sides.
    """

    method: Literal["alignment"] = "alignment"
    loss: Literal["mse", "l2", "sq", "cosine"] = "mse"
    tokens: Literal["class", "patches", "both"] = "class"
    grid: Literal["bicubic"] | None = None


class SEED(Projected):
    """Similarities to a queue of the teacher's embeddings and to the sample's own (student/losses/seed.py)."""

    method: Literal["seed"] = "seed"
    queue: int = Field(65536, ge=1)
    tau_student: float = Field(0.2, gt=0)
    tau_teacher: float = Field(0.01, gt=0)


class CompRess(Projected):
    """Similarities to a queue of embeddings (student/losses/compress.py).

    queues: 1, the teacher's for both sides, or 2, one of each side's own.
    """

    method: Literal["compress"] = "compress"
    queue: int = Field(128000, ge=1)
    queues: Literal[1, 2] = 1
    tau: float = Field(0.04, gt=0)


Loss = CrossEntropy | AAL | DeiT | Attention | Features | ADViT | HeadSpecific | Guidance | Alignment | SEED | CompRess
METHODS: dict[str, type[Loss]] = {
    "crossentropy": CrossEntropy, "aal": AAL, "deit": DeiT, "attention": Attention, "advit": ADViT,
    "features": Features, "head_specific": HeadSpecific,
    "guidance": Guidance, "alignment": Alignment, "seed": SEED, "compress": CompRess,
}  # fmt: skip
