"""Paths of a run: which of its files is meant."""

from __future__ import annotations

from typing import TYPE_CHECKING

from storage.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path


def student_file(run: Path, checkpoint: str) -> Path:
    """The file of a run's student; a file stands for itself. Raises UserError: the run has others, not this one."""
    path = run / f"{checkpoint}.safetensors" if run.is_dir() or not run.suffix else run
    others = [name for name in ("last", "best", "ema") if (run / f"{name}.safetensors").is_file()]
    if others and not path.exists():
        why = " (an average is kept with --set model_ema_decay=0.999)" if checkpoint == "ema" else ""
        raise UserError(
            f"{run} has no student {checkpoint!r}{why}; it has {', '.join(others)}: --checkpoint {others[0]}"
        )
    if not path.exists() and not run.suffix:
        begun = (run / "args.yaml").exists()
        do = "run the same `pipeline train` command with --resume" if begun else "`pipeline train` writes one"
        raise UserError(f"{run}: {'no student here yet' if begun else 'no student here'}; {do}")
    return path
