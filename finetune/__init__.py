"""What a pre-trained encoder is worth: features, weighted kNN, linear probe."""

from finetune.features import Features, ProbeConfig, extract_features
from finetune.knn import knn_accuracy
from finetune.linear_probe import ProbeResult, linear_probe
from finetune.score import score_encoder

__all__ = [
    "Features",
    "ProbeConfig",
    "ProbeResult",
    "extract_features",
    "knn_accuracy",
    "linear_probe",
    "score_encoder",
]
