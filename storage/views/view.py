"""Views: the explicit parameters that turn a sample's bytes into one uint8 image, and their row in a bank."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import numpy as np

# The columns of a bank.
COLUMNS = (
    "valid",
    *("left", "top", "right", "bottom"),  # crop box in the source image's pixels, resized to S×S (bicubic)
    *("shift_x", "shift_y"),  # the S×S frame is moved by whole pixels; what comes in is black
    "flip",
    *("op1", "magnitude1", "op2", "magnitude2", "op3", "magnitude3", "op4", "magnitude4"),
    *("erase_left", "erase_top", "erase_right", "erase_bottom", "erase_seed"),
    *("mix", "partner", "amount", "mix_left", "mix_top", "mix_right", "mix_bottom"),
)


MIXUP, CUTMIX = 1, 2
Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """How a view image is mixed with its partner's, after both were rendered.

    Attributes:
        kind: MIXUP (the whole image is blended) or CUTMIX (the box comes from the partner).
        partner: the partner's index in the shard.
        amount: the partner's share of the image, and of the label, in 1/256.
        box: left, top, right, bottom; of CUTMIX.
    """

    kind: int
    partner: int
    amount: int
    box: tuple[int, int, int, int] = (0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class View:
    """The parameters of one view image. Boxes are (left, top, right, bottom)."""

    box: Box
    _: KW_ONLY
    shift: tuple[int, int] = (0, 0)
    flip: bool = False
    valid: bool = True
    operations: tuple[tuple[int, float], ...] = ()  # numbers of storage.operations, with their arguments
    erased: tuple[int, int, int, int] = (0, 0, 0, 0)
    erase_seed: int = 0
    mix: Mix | None = None

    def row(self) -> np.ndarray:
        """The view as one row of a bank, f64 [columns]."""
        row = np.zeros(len(COLUMNS), np.float64)
        row[0] = self.valid
        row[1:5] = self.box
        row[5:7] = self.shift
        row[7] = self.flip
        row[8 : 8 + 2 * len(self.operations)] = np.ravel(self.operations)
        row[16:20], row[20] = self.erased, self.erase_seed
        row[22] = -1
        if self.mix:
            row[21:28] = self.mix.kind, self.mix.partner, self.mix.amount, *self.mix.box
        return row

    @classmethod
    def of(cls, row: np.ndarray) -> View:
        """The view that a row of a bank says."""
        values: list[float] = row.tolist()
        left, top, right, bottom = values[1:5]
        integers = [int(x) for x in values]
        operations = tuple((integers[i], values[i + 1]) for i in range(8, 16, 2) if integers[i])
        kind, partner, amount, x, y, x2, y2 = integers[21:28]
        return cls(
            (left, top, right, bottom),
            shift=(integers[5], integers[6]),
            flip=bool(values[7]),
            valid=bool(values[0]),
            operations=operations,
            erased=(integers[16], integers[17], integers[18], integers[19]),
            erase_seed=integers[20],
            mix=Mix(kind=kind, partner=partner, amount=amount, box=(x, y, x2, y2)) if kind else None,
        )


INVALID = View((0, 0, 0, 0), valid=False)
