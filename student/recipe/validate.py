"""Validation of recipes, with messages that name the nearest known setting."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from storage.errors import UserError, did_you_mean
from student.losses.registry import LOSSES
from student.recipe.schema import Recipe
from student.settings import ATTENTION_COPY
from student.upgrade import renamed

if TYPE_CHECKING:
    from collections.abc import Iterable


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
    if (name := ATTENTION_COPY) in recipe.losses:
        raise UserError(f"{where}: losses.{name}: {name} is a section beside losses; give the loss another name")
    if not recipe.losses:
        raise UserError(f"{where}: losses: no loss is enabled; known: {', '.join(LOSSES)}")
    return recipe


def with_same_classes(recipe: Recipe) -> Recipe:
    """The recipe with the word that teachers' classes are the student's, where one of the lists is unknown."""
    losses = {**recipe.losses}
    for name, loss in recipe.losses.items():
        if "same_classes" in type(loss).model_fields:
            losses[name] = loss.model_copy(update={"same_classes": True})
    return recipe.model_copy(update={"losses": losses})


_EXPECTED = {
    "heads": "a rule that this loss takes (docs/recipes.md), or pairs such as [[1, 2], [2, 4]] (student's head, "
    "teacher's head), also as a mapping from the student's layer",
    "layers": "last, uniform, first-N, last-N, or pairs such as [[1, 2], [2, 4]] (student's layer, teacher's layer)",
    "target": "a target's id, or a list of ids",
    "links": "full, alpha, beta, a run's folder (or a mapping with run, loss, normalize: abs or printed, granularity: "
    "channel or block, threshold from 0 to 1), or the first and last layer of each stage, [[1, 3], [2, 4]]",
    "weight": "a number, or a mapping with start and shape (exponential, linear, cosine) and what belongs to it",
    "mean": "one number or three",
    "std": "one number above 0, or three",
    "fused_attn": "auto, true or false",
    **dict.fromkeys(("init", "freeze"), "a pattern, or a list of patterns"),
}


def _explain(problem: Any) -> str:
    path = [str(part) for part in problem["loc"]]
    is_loss = path[0] == "losses"
    if is_loss and problem["type"] == "union_tag_invalid":
        name = ".".join(path)
        if "method" in problem["input"]:
            return f"{name}.method: no such setting. It is now {f'{name}.type'!r}."
        known = did_you_mean(str(problem["ctx"]["tag"]), LOSSES)
        return f"{name}: no such loss. {known} A second loss of one kind has a name of its own and `type`."
    section: Any = Recipe
    below = path[1:]
    if is_loss and len(path) > 2:
        section = LOSSES[path[2]].Config if path[2] in LOSSES else None
        below = path[3:]
        del path[2]  # pydantic names the type beside the loss
    elif below:
        section = section_of(Recipe, path[0])
    for at, part in enumerate(path):  # what may be several kinds of thing: pydantic tells of each that it tried
        other = is_loss and (at == 1 or section is LOSSES["crossentropy"].Config)  # a loss may be called anything
        if part in _EXPECTED and not other and not (part == "weight" and at + 1 < len(path)):
            return f"{'.'.join(path[: at + 1])}: expected {_EXPECTED[part]}"
    for part in below[:-1] if problem["type"] == "extra_forbidden" else ():
        section = section and section_of(section, part)
    return sentence(".".join(path), problem, section)


def sentence(name: str, problem: Any, section: Any) -> str:
    """One of pydantic's problems in our words: the setting, and the nearest known one or what was expected.

    Args:
        name: of the setting, with dots.
        problem: one of `ValidationError.errors()`.
        section: the model that an unknown setting was found in, if it is known.
    """
    if problem["type"] == "extra_forbidden":
        below = problem["input"] if isinstance(problem["input"], dict) else ()
        known = f" {suggested(name, section, below)}" if section else ""
        return f"{name}: no such setting.{known}"
    message = str(problem["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    message = re.sub(r", unable to (parse|interpret) .*", "", message)  # what was found says it better
    settings = "mapping of settings (name: value)"
    message = re.sub(r"valid dictionary( or (instance of \w+|object to extract fields from))?", settings, message)
    value = repr(problem["input"])
    value = value if len(value) <= 120 else f"{value[:119]}…"
    text = "" if problem["type"] in ("missing", "value_error") else f", found {value}"
    return f"{name}: {message[0].lower()}{message[1:]}{text}"


def suggested(name: str, section: Any, below: Iterable[str] = ()) -> str:
    """The setting that an unknown one stands for: its name of today, one like it, or that of its name elsewhere.

    Args:
        name: of the setting, with dots.
        section: the model that does not have it.
        below: what is set of it, where it is a section.
    """
    *parents, part = name.split(".")
    loss = section.model_fields.get("type")
    if today := renamed(f"losses.{loss.default}" if loss else ".".join(parents)).get(part):
        now = ".".join([*parents, today])
        return f"It is now {', '.join(f'{now}.{renamed(now).get(one, one)}' for one in below) or now!r}."
    sections = {name: section_of(Recipe, name) for name in Recipe.model_fields}
    homes = [f"{name}.{part}" for name, other in sections.items() if other and part in other.model_fields]
    if homes and section in (Recipe, *sections.values()):
        return f"Did you mean {homes[0]!r}?"
    return did_you_mean(part, section.model_fields)


def section_of(section: Any, part: str) -> Any:
    """The model of a setting's own settings; None where it has none."""
    field = section.model_fields.get(part)
    if field is None:
        return None
    kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
