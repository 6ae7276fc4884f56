"""A run's folder: who may write into it, its log, and what marks a smoke run.

A run leaves `args.yaml` (the whole recipe), `run.json` (what it was trained with), `log.jsonl` (a line a stretch of
steps and a line an epoch), `checkpoint.pt`, `last`, `best` and `ema.safetensors` (timm state dicts),
`losses.safetensors` (links and the like), `tensorboard/`, `result.json`, the model card `README.md`, and for timm
`config.json` and `model.safetensors`, a link to `last.safetensors`. Of a student whose network is one's own there is
`network.py`, a copy of its file, in place of the last two. A smoke run leaves `SMOKE` beside them.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, cast

from storage.errors import UserError, setting
from storage.objects.atomic import atomic_write, temporary_path
from student.upgrade import upgraded_run

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

CHECKPOINT, RESULT, LOG, SMOKE, CARD = "checkpoint.pt", "result.json", "log.jsonl", "SMOKE", "README.md"
ABOUT, LOSSES = "run.json", "losses.safetensors"
NETWORK = "network.py"  # the file of a student's function; nothing runs it
CONFIG, WEIGHTS = "config.json", "model.safetensors"  # by timm's names
LAST, BEST, EMA = "last.safetensors", "best.safetensors", "ema.safetensors"
_BOARD = "tensorboard"
_FILES = (ABOUT, LOG, CHECKPOINT, LAST, BEST, EMA, LOSSES, _BOARD, RESULT, CARD, CONFIG, WEIGHTS, NETWORK)
# What a kill leaves of them counts as nothing. The marks are last: until they go, the folder is a run's.
_LEFT = (*(temporary_path(Path(name)).name for name in _FILES), *_FILES, "args.yaml", SMOKE)


class TrainResult(TypedDict):
    """What a run gave; scores are percent, and None where they could not be taken."""

    run: str
    top1: float | None
    top5: float | None
    best_top1: float | None
    ema_top1: NotRequired[float]
    ema_top5: NotRequired[float | None]
    samples: int | None
    epochs: int
    steps: int
    targets: dict[str, list[str]]
    bank: str | None
    policy: str
    views: int | None
    control: dict[str, Any]
    precision: dict[str, Any]
    seconds: float
    smoke: bool


def is_smoke(out: Path) -> bool:
    """Whether a smoke run lies in a folder."""
    return (out / SMOKE).exists()


def never_kept(out: Path) -> bool:
    """Whether a run lies here that was cut off before its first checkpoint, and nothing else."""
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    return "args.yaml" in names and not names & {CHECKPOINT, RESULT, SMOKE} and names <= {*_LEFT}


def require_free(out: Path) -> None:
    """Refuse a folder that holds anything but a smoke run. Raises UserError."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError("a file, not a folder", setting=setting("out", out), hint="Give another folder.")
    names = sorted(path.name for path in out.iterdir())
    if names and not is_smoke(out):
        if not {"args.yaml", CHECKPOINT, RESULT} & {*names}:
            hint = f"Give a new folder: {setting('out', 'RUN')}"
            raise UserError(f"{out}: this folder has other files ({names[0]}, …)", hint=hint)
        hint = f"For another run, give a new folder: {setting('out', 'RUN')}"
        if CHECKPOINT in names or never_kept(out):
            hint = f"To resume it, add {setting('resume', True)}\n  {hint}"
        raise UserError(f"{out}: this folder already has a run", hint=hint)
    for name in names:
        if name not in _LEFT:
            text = f"a smoke run may be overwritten, but this folder also has {name}; give a new folder"
            raise UserError(f"{out}: {text}")


def begin(out: Path, smoke: bool) -> None:
    """Make the folder, rid of an earlier smoke run, and mark it if this is one."""
    out.mkdir(parents=True, exist_ok=True)
    for name in _LEFT:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if smoke:
        text = "A smoke run: a few steps, to see that everything works. Its student has learned nothing.\n"
        (out / SMOKE).write_text(text)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON object for people, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def result(out: Path) -> TrainResult | None:
    """What a complete run gave; None where it was cut off before it was written."""
    return cast("TrainResult | None", upgraded_run(_object(out / RESULT)))


def about(out: Path) -> dict[str, Any]:
    """What a run was trained with, as far as it is written there; nothing where no run is."""
    return _object(out / ABOUT) or {}


def _object(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


class Log:
    """`log.jsonl`, and TensorBoard if wanted: records as they come.

    Args:
        out: the run's folder; None writes nothing, on other ranks than the first.
        keep: bytes that stay when a run goes on; what came after its checkpoint is cut off, for it comes again.
        tensorboard: whether scalars go there too.
        step: the update that a resumed run goes on with.
    """

    def __init__(self, out: Path | None, keep: int = 0, tensorboard: bool = False, step: int = 0) -> None:
        self._file, self._board = None, None
        if out is None:
            return
        self._file = (out / LOG).open("ab")
        if self._file.tell() > keep:
            self._file.seek(self._file.truncate(keep))
        if tensorboard:
            self._board = board_writer()(str(out / _BOARD), purge_step=step or None)

    def write(self, record: dict[str, Any], update: int) -> None:
        """A line, and its numbers in TensorBoard at an update."""
        if self._file is not None:
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()
        if self._board is not None:
            part = "steps" if "step" in record else "epochs"
            for name, value in _scalars(record):
                self._board.add_scalar(f"{part}/{name}", value, update)

    def sync(self) -> int:
        """Bring everything to the disk; the log's size in bytes."""
        if self._board is not None:
            self._board.flush()
        if self._file is None:
            return 0
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """No more records come."""
        for part in (self._file, self._board):
            if part is not None:
                part.close()


def board_writer() -> Any:
    """TensorBoard's writer. Raises UserError where the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        missing = "tensorboard=true needs the package tensorboard: pip install -c constraints.txt tensorboard"
        raise UserError(missing) from None
    return SummaryWriter


def _scalars(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name not in ("epoch", "step"):
            yield f"{prefix}{name}", float(value)
