"""Teachers: a frozen network, a cache of its outputs, or an ensemble of several."""

from lightning_rkd.distillation.teachers.base import BaseTeacher as BaseTeacher
from lightning_rkd.distillation.teachers.base import TeacherOutput as TeacherOutput
from lightning_rkd.distillation.teachers.cache_format import CacheError as CacheError
from lightning_rkd.distillation.teachers.cached import CachedTeacher as CachedTeacher
from lightning_rkd.distillation.teachers.ensemble import EnsembleTeacher as EnsembleTeacher
from lightning_rkd.distillation.teachers.ensemble import joint_embedding as joint_embedding
from lightning_rkd.distillation.teachers.teacher import Teacher as Teacher
from lightning_rkd.distillation.teachers.weights import load_weights as load_weights
