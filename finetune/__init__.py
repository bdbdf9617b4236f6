"""What pre-trained encoders are for: fine-tuning, probes, evaluation; training from scratch."""

from finetune.classifier import classify
from finetune.config import ClassifierConfig
from finetune.evaluation import EvaluateConfig, evaluate, read_classifier_config
from finetune.features import Features, ProbeConfig, extract_dataset_features
from finetune.learning_dynamics import DynamicsConfig, dynamics
from finetune.objective import HeldOutAccuracy
from finetune.probes import knn, linear_probe, score_encoder

__all__ = [
    "ClassifierConfig",
    "DynamicsConfig",
    "EvaluateConfig",
    "Features",
    "HeldOutAccuracy",
    "ProbeConfig",
    "classify",
    "dynamics",
    "evaluate",
    "extract_dataset_features",
    "knn",
    "linear_probe",
    "read_classifier_config",
    "score_encoder",
]
