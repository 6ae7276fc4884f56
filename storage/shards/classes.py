"""`classes.json`: the names of a dataset's classes, beside its shards."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from storage.errors import IdentityError, UserError, call, first_few, first_line
from storage.objects.object_store import open_object_store
from storage.shards.tar import folder_of
from storage.unicode_names import all_normalized

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def classes_of(urls: Iterable[str]) -> list[str] | None:
    """The class names in the `classes.json` beside the shards, in order and in NFC; None where there is none.

    Raises:
        UserError: shards from several folders whose lists differ, or a file that is no list of distinct names.
    """
    by_file: dict[str, list[str]] = {}
    for folder in sorted({folder_of(url)[0] for url in urls}):
        name = f"{folder.rstrip('/')}/classes.json"
        try:
            content = json.loads(open_object_store(folder).get("classes.json"))
        except FileNotFoundError:
            continue
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name}: not JSON: {first_line(error)}") from None
        is_names = isinstance(content, list) and all(isinstance(c, str) for c in content)
        names = all_normalized(content) if is_names else []
        if not names or len(set(names)) < len(names):
            raise UserError(f"{name}: expected a list of distinct class names, in the order of the labels")
        by_file[name] = names
    lists = list(by_file.values())
    if any(other != lists[0] for other in lists):
        raise UserError(f"the shards' class lists differ: {', '.join(by_file)}; training needs one list")
    return lists[0] if lists else None


def require_classes(urls: Sequence[str], expected: Sequence[str]) -> None:
    """Refuse shards whose class list is there and is another one. Raises IdentityError."""
    actual, expected = classes_of(urls), all_normalized(expected)
    if actual is None or actual == expected:
        return
    where = f"{folder_of(urls[0])[0].rstrip('/')}/classes.json"
    hint = f"Give shards of the same classes, such as those that {call('pack', '…', val_fraction=0.1)} splits off."
    if len(actual) == len(expected):
        at = next(i for i, (a, b) in enumerate(zip(expected, actual, strict=True)) if a != b)
        raise IdentityError(where, f"class {at}", repr(expected[at]), repr(actual[at]), hint)
    raise IdentityError(where, "classes", class_list(expected), class_list(actual), hint)


def class_list(names: Sequence[str]) -> str:
    """How many classes there are, and the first names."""
    return f"{len(names)} ({first_few(names, 4)})"
