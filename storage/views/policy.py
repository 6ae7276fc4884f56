"""Policies: one line of operations that says what views are drawn from, such as `rrc(0.08,1)|flip|mix(0.8,1)`.

A line is one framing (`resize`, `short(f)|center`, `crop(p)` or `rrc(lo,hi)`) and then, each at most once and in this
order, `flip`, `randaug(m,std)`, `erase(p)` and `mix(mixup,cutmix)`. The normalized line is hashed into every bank made
with it, so two spellings of one policy are one policy.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from storage.constants import BLOCK
from storage.errors import UserError, did_you_mean
from storage.objects import json_record

# Raised when the pixels or the draws of any operation change: banks of another version are other banks.
OPERATIONS_VERSION = 1

NAMED = {
    "none": "resize",
    "eval": "short(0.875)|center",
    "light": "crop(0.125)|flip",
    "deit": "rrc(0.08,1)|flip|randaug(9,0.5)|erase(0.25)|mix(0.8,1)",
}

# name -> number of arguments
_OPERATIONS = {"resize": 0, "short": 1, "center": 0, "crop": 1, "rrc": 2, "flip": 0, "randaug": 2, "erase": 1, "mix": 2}
_WITHOUT_CHANCE = {"resize", "short", "center"}
Operation = tuple[str, tuple[float, ...]]  # name and arguments
_AFTER = ("flip", "randaug", "erase", "mix")  # what may follow the framing, in this order


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What the views of a bank are drawn from; made by `policy`.

    Attributes:
        line: the normalized line of operations.
        size: side S of the square view images.
        seed: of the draws.
        name: of the line, `custom` where it has none.
    """

    line: str
    size: int
    seed: int = 0
    name: str = "custom"

    @property
    def operations(self) -> tuple[Operation, ...]:
        """(name, arguments) of each operation."""
        return _parse(self.line)

    @property
    def random(self) -> bool:
        """Whether views differ: a line without chance has one view and no seed in its id."""
        return any(name not in _WITHOUT_CHANCE for name, _ in self.operations)

    @property
    def mixes(self) -> bool:
        """Whether views are mixed with others of their block."""
        return any(name == "mix" for name, _ in self.operations)

    @property
    def bank(self) -> str:
        """The bank's id, `{policy}-{size}-{hash8}`."""
        return f"{self.name}-{self.size}-{json_record.digest_of(self.identity)[:8]}"

    @property
    def identity(self) -> dict[str, object]:
        """What makes two banks the same bank."""
        drawn_from = {"line": self.line, "size": self.size, "seed": self.seed if self.random else None}
        return {**drawn_from, "block": BLOCK, "operations": OPERATIONS_VERSION}

    @property
    def evaluation(self) -> Policy:
        """The view that a student trained under this policy is evaluated on."""
        cropped = any(name == "rrc" for name, _ in self.operations)
        return policy("short(0.875)|center" if cropped else "short(1)|center", self.size)


def policy(line: str, size: int, seed: int = 0) -> Policy:
    """The policy of a name or a line.

    Args:
        line: `none`, `eval`, `light`, `deit`, or a line of operations such as `rrc(0.2,1)|flip`.
        size: side of the square view images.
        seed: of the draws.

    Raises:
        UserError: an unknown name or operation, arguments out of range, operations in an order that makes no view.
    """
    if not 1 <= size <= 4096:
        raise UserError(f"view size {size}: expected 1 to 4096 pixels")
    if not 0 <= seed < 2**63:
        raise UserError(f"seed {seed}: expected an integer from 0 below 2**63")
    operations = _parse(NAMED.get(line.strip(), line))
    names = [name for name, _ in operations]
    framing = 2 if names[:2] == ["short", "center"] else 1
    if names[0] not in ("resize", "crop", "rrc") and framing == 1:
        square = "resize, short(f)|center, crop(p) or rrc(lo,hi)"
        raise UserError(f"view policy {line!r}: it must begin with what makes a square image: {square}")
    after = [_AFTER.index(name) if name in _AFTER else -1 for name in names[framing:]]
    if -1 in after or after != sorted(set(after)):
        first, later = "|".join(names[:framing]), ", ".join(_AFTER)
        raise UserError(f"view policy {line!r}: after {first} may follow {later}, each once and in this order")
    for name, arguments in operations:
        _check(line, name, arguments)
    normal = "|".join(
        name + (f"({','.join(f'{a + 0:g}' for a in args)})" if args else "")  # + 0: minus zero is zero
        for name, args in operations
    )
    by_line = {value: key for key, value in NAMED.items()}
    return Policy(line=normal, size=size, seed=seed, name=by_line.get(normal, "custom"))


def _check(line: str, name: str, arguments: tuple[float, ...]) -> None:
    """Refuse arguments that make no sense; a NaN is in no range."""
    a, b = (*arguments, 0.0, 0.0)[:2]
    rules = {
        "short": (0.1 <= a <= 1, "(f) takes the part of the image that is kept, 0.1 to 1"),
        "crop": (0 <= a <= 1, "(p) takes the border as a part of the side, 0 to 1"),
        "rrc": (0 < a <= b <= 1, "(lo,hi) takes the smallest and the largest part of the area, above 0 up to 1"),
        "randaug": (0 <= a <= 10 and 0 <= b <= 10, "(m,std) takes a magnitude and its deviation, 0 to 10"),
        "erase": (0 < a <= 1, "(p) takes a probability, above 0 up to 1"),
        "mix": (
            0 <= a <= 100 and 0 <= b <= 100 and a + b > 0,
            "(mixup,cutmix) takes the alpha of each, 0 for none of it, at most 100, and not 0 for both",
        ),
    }
    valid, rule = rules.get(name, (True, ""))
    if not valid:
        raise UserError(f"view policy {line!r}: {name}{rule}")


@functools.lru_cache(maxsize=64)
def _parse(line: str) -> tuple[Operation, ...]:
    """The operations of a line; those of the lines in use are kept, because every draw asks for them."""
    operations = []
    for text in line.split("|"):
        match = re.fullmatch(r"\s*([a-z]+)\s*(?:\(([^()]*)\))?\s*", text)
        if not match or match[1] not in _OPERATIONS:
            word = match[1] if match else text.strip()
            if word in NAMED:
                raise UserError(f"view policy {line!r}: {word!r} is a whole policy ({NAMED[word]}), not an operation")
            hint = did_you_mean(word, [*_OPERATIONS, *NAMED])
            raise UserError(f"view policy {line!r}: no operation is called {word!r}", hint=hint)
        try:
            arguments = tuple(float(a) for a in match[2].split(",")) if match[2] else ()
        except ValueError:
            raise UserError(f"view policy {line!r}: {text.strip()!r}: arguments are numbers") from None
        count = _OPERATIONS[match[1]]
        if len(arguments) != count:
            raise UserError(f"view policy {line!r}: {match[1]} takes {count} argument(s), found {len(arguments)}")
        operations.append((match[1], arguments))
    return tuple(operations)
