"""What pre-trained encoders are for: fine-tuning, probes, evaluation; training from scratch."""

from finetune.classifier import classify
from finetune.config import ClassifierConfig
from finetune.evaluation import EvaluateConfig, evaluate, stored_classifier
from finetune.features import Features, ProbeConfig, extract_features
from finetune.learning_dynamics import DynamicsConfig, dynamics
from finetune.objective import HeldOut
from finetune.probes import knn, linear_probe, score_encoder

__all__ = [
    "ClassifierConfig",
    "DynamicsConfig",
    "EvaluateConfig",
    "Features",
    "HeldOut",
    "ProbeConfig",
    "classify",
    "dynamics",
    "evaluate",
    "extract_features",
    "knn",
    "linear_probe",
    "score_encoder",
    "stored_classifier",
]
