"""Masked autoencoder pre-training under the EfficientTrain++ frequency curriculum."""

from mae_et.checkpoints.export import export
from mae_et.checkpoints.load import load_pretrained
from mae_et.config.files import load_config
from mae_et.config.schema import PretrainConfig
from mae_et.curriculum.frequency import low_frequency_crop
from mae_et.curriculum.schedule import Curriculum, Plan, Stage
from mae_et.errors import Interrupted, RunFailed, UserError
from mae_et.models.mae import MaskedAutoencoder, Reconstruction
from mae_et.models.targets import hog
from mae_et.pretraining import pretrain
from mae_et.version import __version__

__all__ = [
    "Curriculum",
    "Interrupted",
    "MaskedAutoencoder",
    "Plan",
    "PretrainConfig",
    "Reconstruction",
    "RunFailed",
    "Stage",
    "UserError",
    "__version__",
    "export",
    "hog",
    "load_config",
    "load_pretrained",
    "low_frequency_crop",
    "pretrain",
]
