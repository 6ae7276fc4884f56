"""What a recipe says, validated: student, losses with their targets and weights, optimiser, schedule and stream.

Names are timm's where timm has one. Unknown keys are refused with the nearest known one.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import BaseModel, BeforeValidator, Discriminator, Field, ValidationError, model_validator

from storage.errors import UserError, nearest
from student.loss_settings import COPYING, Copying, Section, Term
from student.losses import methods

if TYPE_CHECKING:
    Loss = Term
else:  # of every method that is there
    Loss = Union[tuple(module.Settings for module in methods().values())]  # noqa: UP007


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _three(value: Any) -> Any:
    return (value,) * 3 if isinstance(value, int | float) else value


Positive = Annotated[float, Field(gt=0)]
Patterns = Annotated[tuple[str, ...], BeforeValidator(_listed)]


class Student(Section):
    """The timm network that is trained, a ViT for most losses; what is None is the model's own default.

    `shifted_patches` sees each patch with four shifts of its image (student/shifted.py), which no bare timm model does.
    `pretrained` takes timm's weights, `weights` a file (safetensors or .pth, also a student's), `weights_key` one of
    several dictionaries of weights in it, by default the one that timm takes. `init` says which parameters are taken
    from them, `freeze` which are not trained: shell patterns over the names of a state dict, such as `blocks.*.attn.*`.
    A head of other classes is always new. Pixels are normalised by `mean` and `std`; None: as the given weights want it
    (their file's own, or timm's for the model), 0.5 without weights.
    """

    model: str = "vit_tiny_patch16_224"
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
    shifted_patches: bool = False
    pretrained: bool = False
    weights: str | None = None
    weights_key: str | None = None
    init: Patterns = ("*",)
    freeze: Patterns = ()
    mean: Annotated[tuple[float, float, float] | None, BeforeValidator(_three)] = None
    std: Annotated[tuple[Positive, Positive, Positive] | None, BeforeValidator(_three)] = None

    @model_validator(mode="after")
    def _one_source(self) -> Student:
        if self.pretrained and self.weights:
            raise ValueError("pretrained and weights are both given; choose one: --set student.pretrained=false")
        if self.init != ("*",) and not (self.pretrained or self.weights):
            raise ValueError("init chooses among given weights: say pretrained=true or weights=FILE")
        if self.weights_key is not None and not self.weights:
            raise ValueError("weights_key chooses in a file of weights: say weights=FILE")
        return self


def _by_name(value: Any) -> Any:
    """Each loss is of the method that it is called after, unless it names another; one that is null is off."""
    if not isinstance(value, dict):
        return value
    there = {name: settings for name, settings in value.items() if settings is not None}
    return {name: {"method": name, **s} if isinstance(s, dict) else s for name, s in there.items()}


Name = Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$")]
Losses = Annotated[dict[Name, Annotated[Loss, Discriminator("method")]], BeforeValidator(_by_name)]


class Optim(Section):
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
    betas: tuple[float, float] | None = None
    layer_decay: float | None = Field(None, gt=0, le=1)
    accumulate: int = Field(1, ge=1, description="pieces that each batch is cut into; the batch stays the same")


class Bank(Section):
    """Which bank of the store, or which policy fresh views are drawn from."""

    id: str | None = None
    policy: str | None = None
    size: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0)


def _by_id(value: Any) -> Any:
    return {"id": value} if isinstance(value, str) else value


class StreamSettings(Section):
    """Batches and their order."""

    batch_size: int = Field(128, ge=1)
    workers: int = Field(0, ge=0)
    lanes: int | None = Field(None, ge=1)
    window: int = Field(4, ge=1)
    views: int | None = Field(None, ge=1)
    memory: float | None = Field(None, gt=0, description="GiB that lanes may hold")
    bank: Annotated[Bank, BeforeValidator(_by_id)] = Bank()


class Control(Section):
    """Controls of a claim: the same run with targets that cannot know the image. One of them at most.

    permute_targets: targets of other images of the same block, by a fixed derangement of this seed.
    mean_targets: every image gets the mean target of the training set.
    """

    permute_targets: int | None = Field(None, ge=0)
    mean_targets: bool = False

    @model_validator(mode="after")
    def _one(self) -> Control:
        if self.permute_targets is not None and self.mean_targets:
            raise ValueError("permute_targets and mean_targets are both given; choose one")
        return self


class Speed(Section):
    """How the student is computed.

    amp: none is float32; `auto` takes what the device computes natively, which is said and kept when it is resumed.
    attention: `auto` is unfused for bfloat16 on a CPU, else fused.
    """

    amp: Literal["auto", "none", "bfloat16", "float16"] = "none"
    attention: Literal["auto", "fused", "unfused"] = "auto"
    compile: bool = False


class Recipe(Section):
    """A whole recipe."""

    student: Student = Student()
    losses: Losses
    copying: Copying | None = None
    optim: Optim = Optim()
    ema: float | None = Field(None, gt=0, lt=1, description="decay of the averaged student; None: none is kept")
    stream: StreamSettings = StreamSettings()
    control: Control = Control()
    speed: Speed = Speed()
    val_interval: int = Field(1, ge=1, description="epochs between evaluations; the last one is always evaluated")
    checkpoint_interval: int | None = Field(None, ge=1, description="steps between checkpoints within an epoch")
    tensorboard: bool = False
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
        lines = dict.fromkeys(_explain(problem) for problem in error.errors())
        raise UserError(f"{where}: " + "; ".join(lines)) from None
    if COPYING in recipe.losses:
        raise UserError(f"{where}: losses.copying: copying is a section beside losses; call the loss otherwise")
    if not recipe.losses:
        raise UserError(f"{where}: losses: none is on; known: {', '.join(methods())}")
    return recipe


def with_same_classes(recipe: Recipe) -> Recipe:
    """The recipe with the word that teachers' classes are the student's, where one of the lists is unknown."""
    losses = {
        name: loss.model_copy(update={"same_classes": True}) if "same_classes" in type(loss).model_fields else loss
        for name, loss in recipe.losses.items()
    }
    return recipe.model_copy(update={"losses": losses})


_EXPECTED = {
    "heads": "a rule that this loss takes (docs/recipes.md), or pairs such as [[1, 2], [2, 4]] (student's head, "
    "teacher's head), also as a mapping from the student's layer",
    "layers": "last, uniform, first-N, last-N, or pairs such as [[1, 2], [2, 4]] (student's layer, teacher's layer)",
    "target": "a target's id, or a list of ids",
    "links": "full, alpha, beta, a run's folder (or a mapping with run, loss, normalise: abs or printed, granularity: "
             "channel or block, threshold from 0 to 1), or the first and last layer of each stage, [[1, 3], [2, 4]]",
    "weight": "a number, or a mapping with start and shape (exponential, linear, cosine) and what belongs to it",
    "mean": "one number or three", "std": "one number above 0, or three",
    "init": "a pattern, or a list of patterns", "freeze": "a pattern, or a list of patterns",
}  # fmt: skip


def _explain(problem: Any) -> str:
    path = [str(part) for part in problem["loc"]]
    section: Any = Recipe
    if path[0] == "losses" and problem["type"] == "union_tag_invalid":
        known = nearest(str(problem["ctx"]["tag"]), methods())
        return f"{'.'.join(path)}: no such loss. {known} A second loss of one kind has a name of its own and `method`."
    below = path[1:] if path[0] != "losses" or len(path) < 3 else path[3:]
    if path[0] == "losses" and len(path) > 2:
        module = methods().get(path[2])
        section = module and module.Settings
        del path[2]  # pydantic names the method beside the loss
    elif below:
        section = section_of(Recipe, path[0])
    for at, part in enumerate(path):  # what may be several kinds of thing: pydantic tells of each that it tried
        named = path[0] == "losses" and (
            at == 1 or section is methods()["crossentropy"].Settings
        )  # a loss may be called anything
        if part in _EXPECTED and not named and not (part == "weight" and at + 1 < len(path)):
            return f"{'.'.join(path[: at + 1])}: expected {_EXPECTED[part]}"
    name = ".".join(path)
    for part in below[:-1] if problem["type"] == "extra_forbidden" else ():
        section = section and section_of(section, part)
    return sentence(name, problem, section)


def sentence(name: str, problem: Any, section: Any) -> str:
    """One of pydantic's problems in our words: the setting, and the nearest known one or what was expected.

    Args:
        name: of the setting, with dots.
        problem: one of `ValidationError.errors()`.
        section: the model that an unknown setting was found in, if it is known.
    """
    if problem["type"] == "extra_forbidden":
        known = f" {suggested(name.rpartition('.')[2], section)}" if section else ""
        return f"{name}: no such setting.{known}"
    message = str(problem["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    message = re.sub(r", unable to (parse|interpret) .*", "", message)  # what was found says it better
    settings = "mapping of settings (name: value)"
    message = re.sub(r"valid dictionary( or (instance of \w+|object to extract fields from))?", settings, message)
    seen = repr(problem["input"])
    seen = seen if len(seen) <= 120 else f"{seen[:119]}…"
    found = "" if problem["type"] in ("missing", "value_error") else f", found {seen}"
    return f"{name}: {message[0].lower()}{message[1:]}{found}"


def suggested(part: str, section: Any) -> str:
    """`Did you mean …?` for a setting that a section does not have: one like it, or that of its name elsewhere."""
    sections = {name: section_of(Recipe, name) for name in Recipe.model_fields}
    homes = [f"{name}.{part}" for name, other in sections.items() if other and part in other.model_fields]
    if homes and section in (Recipe, *sections.values()):
        return f"Did you mean {homes[0]!r}?"
    return nearest(part, section.model_fields)


def section_of(section: Any, part: str) -> Any:
    """The model of a setting's own settings; None where it has none."""
    field = section.model_fields.get(part)
    if field is None:
        return None
    kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
