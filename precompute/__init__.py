"""From shards to the store: teachers, their taps, the exported graphs and the engine that runs them once."""

from typing import TYPE_CHECKING

from storage.lazy_names import lazy_names

if TYPE_CHECKING:
    from precompute.request import PrecomputeRequest
    from precompute.run import precompute
    from precompute.taps.target_spec import TargetSpec, parse_target
    from precompute.teachers.teacher import Teacher, find_teacher

    __version__: str
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "precompute.request": ["PrecomputeRequest"],
            "precompute.run": ["precompute"],
            "precompute.taps.target_spec": ["TargetSpec", "parse_target"],
            "precompute.teachers.teacher": ["Teacher", "find_teacher"],
        },
    )

__all__ = ["PrecomputeRequest", "TargetSpec", "Teacher", "find_teacher", "parse_target", "precompute"]
