"""What a pre-trained encoder is worth: features, weighted kNN, linear probe."""

from finetune.features import Features, ProbeConfig, extract_features
from finetune.score import knn, linear_probe, score_encoder

__all__ = [
    "Features",
    "ProbeConfig",
    "extract_features",
    "knn",
    "linear_probe",
    "score_encoder",
]
