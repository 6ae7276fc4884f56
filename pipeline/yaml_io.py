"""Plain YAML from people: no tags, no aliases, no key twice. Whatever is in a file, it ends in data or in one error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from storage.errors import UserError, first_line

if TYPE_CHECKING:
    from pathlib import Path

LARGEST = 1 << 20  # bytes


class _Loader(yaml.SafeLoader):
    """YAML's safe loader without aliases (a small file can stand for a huge one) and without keys that come twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event: Any = self.peek_event()  # type: ignore[no-untyped-call]
            raise ComposerError(None, None, f"the alias *{event.anchor}: aliases are not read", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise ConstructorError(None, None, f"the key {key.value!r} appears twice", key.start_mark)
                seen.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def read_yaml(path: Path) -> Any:
    """What a file says.

    Raises:
        UserError: it cannot be read, or is not plain YAML; with the line.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(f"{path}: larger than {LARGEST >> 20} MiB; this is not a settings file")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not plain YAML: it is not UTF-8 ({error.reason})") from None
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except Exception as error:  # its constructors raise anything: ValueError, KeyError, IndexError, RecursionError, …
        raise UserError(f"{path}: not plain YAML: {_why(error)}") from None


def value_in(text: str, where: str) -> Any:
    """The value of an argument such as `name=value`. Raises UserError, opened by `where`: it is not plain YAML."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: the value is not plain YAML: {_why(error)}") from None


def _why(error: Exception) -> str:
    """What is no YAML in a text, and where in it."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return first_line(error)[:400]
    tab = "; indent with spaces, not with tabs" if "'\\t'" in str(error.problem) else ""
    began = f", {error.context} from {_place(error.context_mark)} on" if error.context_mark and error.context else ""
    return f"{_place(error.problem_mark)}: {error.problem}{began}{tab}"


def _place(mark: yaml.Mark) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"
