"""From the store to a model: stream, alignment, losses, trainer and evaluation."""

from typing import TYPE_CHECKING

from storage.lazy_names import lazy_names

if TYPE_CHECKING:
    from student.data.batch import Batch
    from student.data.stream import Stream
    from student.evaluation.accuracy import Score, evaluate
    from student.models.build import build_student
    from student.models.files import StudentDescription, load_student, save_student
    from student.models.outside_timm import allow_network
    from student.recipe.schema import Recipe
    from student.settings import StudentConfig
    from student.training.setup import TrainConfig
    from student.training.train import train

    __version__: str
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "student.data.batch": ["Batch"],
            "student.data.stream": ["Stream"],
            "student.evaluation.accuracy": ["Score", "evaluate"],
            "student.models.build": ["build_student"],
            "student.models.files": ["StudentDescription", "load_student", "save_student"],
            "student.models.outside_timm": ["allow_network"],
            "student.recipe.schema": ["Recipe"],
            "student.settings": ["StudentConfig"],
            "student.training.setup": ["TrainConfig"],
            "student.training.train": ["train"],
        },
    )

__all__ = [
    "Batch",
    "Recipe",
    "Score",
    "Stream",
    "StudentConfig",
    "StudentDescription",
    "TrainConfig",
    "allow_network",
    "build_student",
    "evaluate",
    "load_student",
    "save_student",
    "train",
]
