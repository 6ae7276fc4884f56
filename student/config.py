"""What a recipe says, validated: student, losses with their targets and weights, optimiser, schedule and stream.

Names are timm's where timm has one. Unknown keys are refused with the nearest known one.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from storage.errors import UserError, nearest


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Student(_Section):
    """The timm ViT that is trained; what is None is the model's own default."""

    model: str = "vit_tiny_patch16_224"
    img_size: int | None = Field(None, ge=4)
    patch_size: int | None = Field(None, ge=1)
    embed_dim: int | None = Field(None, ge=1)
    depth: int | None = Field(None, ge=1)
    num_heads: int | None = Field(None, ge=1)
    num_classes: int | None = Field(None, ge=1)
    drop_path_rate: float | None = Field(None, ge=0, lt=1)
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)


class Schedule(_Section):
    """A loss's weight over the 0-based epochs e: `start · decay^e`, each break point beginning another decay.

    AAL's λ is `{start: 2000, decay: 0.99, then: {200: 0.98}}` = 2000 · 0.99^min(e, 200) · 0.98^max(0, e − 200).
    """

    start: float
    decay: float = Field(1.0, gt=0)
    then: dict[int, Annotated[float, Field(gt=0)]] = {}

    def at(self, epoch: int) -> float:
        """The weight in an epoch."""
        value, since, decay = self.start, 0, self.decay
        for point in sorted(self.then):
            if point >= epoch:
                break
            value *= decay ** (point - since)
            since, decay = point, self.then[point]
        return float(value * decay ** (epoch - since))


def _constant(value: Any) -> Any:
    return {"start": value} if isinstance(value, int | float) else value


Weight = Annotated[Schedule, BeforeValidator(_constant)]


class CrossEntropy(_Section):
    """Cross-entropy with the labels."""

    weight: Weight = Schedule(start=1.0)
    smoothing: float = Field(0.0, ge=0, lt=1)


class AAL(_Section):
    """Adaptive attention links (student/losses/aal.py)."""

    weight: Weight = Schedule(start=2000.0, decay=0.99, then={200: 0.98})
    teacher: str | None = None
    target: str | None = None
    map: Literal["scaled", "printed", "full"] = "scaled"
    loss: Literal["mse", "norm", "sq"] = "mse"


class Losses(_Section):
    """The losses that are summed, each with its weight; one that is absent is off."""

    crossentropy: CrossEntropy | None = None
    aal: AAL | None = None

    def active(self) -> dict[str, CrossEntropy | AAL]:
        """Name -> settings of the losses that are on."""
        return {name: getattr(self, name) for name in type(self).model_fields if getattr(self, name) is not None}


class Optim(_Section):
    """timm's optimiser and schedule. `lr`, or `lr_base` for `lr_base_size` samples a batch, scaled linearly."""

    opt: str = "adamw"
    lr: float | None = Field(None, gt=0)
    lr_base: float = Field(5e-4, gt=0)
    lr_base_size: int = Field(512, ge=1)
    weight_decay: float = Field(0.05, ge=0)
    sched: Literal["cosine", "step", "multistep", "tanh", "poly"] = "cosine"
    epochs: int = Field(300, ge=1)
    warmup_epochs: int = Field(5, ge=0)
    warmup_lr: float = Field(1e-6, ge=0)
    min_lr: float = Field(1e-5, ge=0)
    clip_grad: float | None = Field(None, gt=0)


class Bank(_Section):
    """Which bank of the store, or which policy fresh views are drawn from."""

    id: str | None = None
    policy: str | None = None
    size: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0)


def _by_id(value: Any) -> Any:
    return {"id": value} if isinstance(value, str) else value


class StreamSettings(_Section):
    """Batches and their order."""

    batch_size: int = Field(128, ge=1)
    workers: int = Field(0, ge=0)
    lanes: int | None = Field(None, ge=1)
    window: int = Field(4, ge=1)
    views: int | None = Field(None, ge=1)
    memory: float | None = Field(None, gt=0, description="GiB that lanes may hold")
    bank: Annotated[Bank, BeforeValidator(_by_id)] = Bank()


class Recipe(_Section):
    """A whole recipe."""

    student: Student = Student()
    losses: Losses
    optim: Optim = Optim()
    stream: StreamSettings = StreamSettings()
    val_interval: int = Field(1, ge=1, description="epochs between evaluations; the last one is always evaluated")
    seed: int = Field(0, ge=0, lt=2**31)


def validate(content: Any, where: str) -> Recipe:
    """The recipe in parsed YAML.

    Raises:
        UserError: naming each wrong field with the nearest known one or what was expected.
    """
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected a mapping with {', '.join(Recipe.model_fields)}")
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors()]
        raise UserError(f"{where}: " + "; ".join(lines)) from None
    if not recipe.losses.active():
        raise UserError(f"{where}: losses: none is on; known: {', '.join(Losses.model_fields)}")
    return recipe


def _explain(problem: Any) -> str:
    path = [str(part) for part in problem["loc"]]
    name = ".".join(path)
    if problem["type"] == "extra_forbidden":
        section: Any = Recipe
        for part in path[:-1]:
            section = _section(section, part)
            if section is None:
                return f"{name}: no such setting"
        return f"{name}: no such setting. {nearest(path[-1], section.model_fields)}"
    found = "" if problem["type"] == "missing" else f", found {problem['input']!r}"
    return f"{name}: {problem['msg'][0].lower()}{problem['msg'][1:]}{found}"


def _section(section: Any, part: str) -> Any:
    field = section.model_fields.get(part)
    if field is None:
        return None
    kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
