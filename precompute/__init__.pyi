from precompute.request import PrecomputeRequest as PrecomputeRequest
from precompute.run import precompute as precompute
from precompute.taps.target_spec import TargetSpec as TargetSpec
from precompute.taps.target_spec import parse_target as parse_target
from precompute.teachers.teacher import Teacher as Teacher
from precompute.teachers.teacher import find_teacher as find_teacher

__version__: str
