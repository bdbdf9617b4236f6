"""Masked autoencoder pre-training under the EfficientTrain++ frequency curriculum."""

from typing import TYPE_CHECKING

from mae_et.lazy import lazy_exports
from mae_et.version import __version__ as __version__

if TYPE_CHECKING:
    from mae_et.checkpoints.encoders import load_encoder as load_encoder
    from mae_et.checkpoints.export import export as export
    from mae_et.checkpoints.load import load_pretrained as load_pretrained
    from mae_et.config.data import DataConfig as DataConfig
    from mae_et.config.efficiency import EfficiencyConfig as EfficiencyConfig
    from mae_et.config.files import load_config as load_config
    from mae_et.config.init import InitConfig as InitConfig
    from mae_et.config.model import ModelConfig as ModelConfig
    from mae_et.config.schema import CropConfig as CropConfig
    from mae_et.config.schema import CurriculumConfig as CurriculumConfig
    from mae_et.config.schema import OptimConfig as OptimConfig
    from mae_et.config.schema import OutputConfig as OutputConfig
    from mae_et.config.schema import PretrainConfig as PretrainConfig
    from mae_et.config.schema import Stage as Stage
    from mae_et.curriculum.frequency import low_frequency_crop as low_frequency_crop
    from mae_et.curriculum.plan import Plan as Plan
    from mae_et.curriculum.schedule import Curriculum as Curriculum
    from mae_et.data.sampler import CurriculumBatchSampler as CurriculumBatchSampler
    from mae_et.data.sampler import SampleIndex as SampleIndex
    from mae_et.data.train_dataset import Batch as Batch
    from mae_et.data.train_dataset import train_transform as train_transform
    from mae_et.data.transforms import normalise as normalise
    from mae_et.errors import Interrupted as Interrupted
    from mae_et.errors import RunFailed as RunFailed
    from mae_et.errors import UserError as UserError
    from mae_et.models.features import extract_features as extract_features
    from mae_et.models.mae import MaskedAutoencoder as MaskedAutoencoder
    from mae_et.models.mae import Reconstruction as Reconstruction
    from mae_et.models.masking import Mask as Mask
    from mae_et.models.masking import mask_from_noise as mask_from_noise
    from mae_et.models.masking import masks as masks
    from mae_et.models.targets import hog as hog
    from mae_et.pretraining import pretrain as pretrain
else:
    __getattr__, __dir__, __all__ = lazy_exports(
        __name__,
        {
            "mae_et.checkpoints.encoders": ["load_encoder"],
            "mae_et.checkpoints.export": ["export"],
            "mae_et.checkpoints.load": ["load_pretrained"],
            "mae_et.config.data": ["DataConfig"],
            "mae_et.config.efficiency": ["EfficiencyConfig"],
            "mae_et.config.files": ["load_config"],
            "mae_et.config.init": ["InitConfig"],
            "mae_et.config.model": ["ModelConfig"],
            "mae_et.config.schema": [
                "CropConfig",
                "CurriculumConfig",
                "OptimConfig",
                "OutputConfig",
                "PretrainConfig",
                "Stage",
            ],
            "mae_et.curriculum.frequency": ["low_frequency_crop"],
            "mae_et.curriculum.plan": ["Plan"],
            "mae_et.curriculum.schedule": ["Curriculum"],
            "mae_et.data.sampler": ["CurriculumBatchSampler", "SampleIndex"],
            "mae_et.data.train_dataset": ["Batch", "train_transform"],
            "mae_et.data.transforms": ["normalise"],
            "mae_et.errors": ["Interrupted", "RunFailed", "UserError"],
            "mae_et.models.features": ["extract_features"],
            "mae_et.models.mae": ["MaskedAutoencoder", "Reconstruction"],
            "mae_et.models.masking": ["Mask", "mask_from_noise", "masks"],
            "mae_et.models.targets": ["hog"],
            "mae_et.pretraining": ["pretrain"],
        },
    )
