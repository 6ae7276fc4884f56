from precompute.taps import allow_network as allow_network
from student.data.batch import Batch as Batch
from student.data.stream import Stream as Stream
from student.evaluation.accuracy import Score as Score
from student.evaluation.accuracy import evaluate as evaluate
from student.models.build import build_student as build_student
from student.models.files import StudentDescription as StudentDescription
from student.models.files import load_student as load_student
from student.models.files import save_student as save_student
from student.recipe.schema import Recipe as Recipe
from student.settings import StudentConfig as StudentConfig
from student.training.setup import TrainConfig as TrainConfig
from student.training.train import train as train

__version__: str
