"""What pre-trained encoders are for: fine-tuning, probes, evaluation; training from scratch."""

from finetune.classify import classify
from finetune.config import ClassifierConfig
from finetune.dynamics import DynamicsConfig, dynamics
from finetune.evaluate import EvaluateConfig, evaluate, stored_classifier
from finetune.features import Features, ProbeConfig, extract_features
from finetune.held_out import HeldOut
from finetune.score import knn, linear_probe, score_encoder

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
