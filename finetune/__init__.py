"""What pre-trained encoders are for: fine-tuning, probes, evaluation; training from scratch."""

from finetune.classify import classify
from finetune.config import ClassifierConfig
from finetune.evaluate import EvaluateConfig, evaluate, stored_classifier
from finetune.features import Features, ProbeConfig, extract_features
from finetune.score import knn, linear_probe, score_encoder

__all__ = [
    "ClassifierConfig",
    "EvaluateConfig",
    "Features",
    "ProbeConfig",
    "classify",
    "evaluate",
    "extract_features",
    "knn",
    "linear_probe",
    "score_encoder",
    "stored_classifier",
]
