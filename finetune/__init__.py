"""Fine-tune, probe and evaluate encoders; train classifiers from scratch."""

from typing import TYPE_CHECKING

from mae_et.lazy import lazy_exports

if TYPE_CHECKING:
    from finetune.classifier import classify as classify
    from finetune.config import ClassifierConfig as ClassifierConfig
    from finetune.embedding import embed as embed
    from finetune.evaluation import evaluate as evaluate
    from finetune.feature_config import EmbedConfig as EmbedConfig
    from finetune.features import Features as Features
    from finetune.features import extract_dataset_features as extract_dataset_features
    from finetune.learning_dynamics import dynamics as dynamics
    from finetune.linear_classifier import ProbeResult as ProbeResult
    from finetune.linear_classifier import probe_features as probe_features
    from finetune.objective import HeldOutAccuracy as HeldOutAccuracy
    from finetune.probes import knn as knn
    from finetune.probes import linear_probe as linear_probe
    from finetune.probes import score_encoder as score_encoder
    from finetune.run_folder import read_classifier_config as read_classifier_config
    from finetune.scoring_config import DynamicsConfig as DynamicsConfig
    from finetune.scoring_config import EvaluateConfig as EvaluateConfig
    from finetune.scoring_config import ProbeConfig as ProbeConfig
    from mae_et.probing.nearest_neighbours import knn_accuracy as knn_accuracy
else:
    __getattr__, __dir__, __all__ = lazy_exports(
        __name__,
        {
            "finetune.classifier": ["classify"],
            "finetune.config": ["ClassifierConfig"],
            "finetune.embedding": ["embed"],
            "finetune.feature_config": ["EmbedConfig"],
            "finetune.evaluation": ["evaluate"],
            "finetune.features": ["Features", "extract_dataset_features"],
            "finetune.learning_dynamics": ["dynamics"],
            "finetune.linear_classifier": ["ProbeResult", "probe_features"],
            "finetune.objective": ["HeldOutAccuracy"],
            "finetune.probes": ["knn", "linear_probe", "score_encoder"],
            "finetune.run_folder": ["read_classifier_config"],
            "finetune.scoring_config": ["DynamicsConfig", "EvaluateConfig", "ProbeConfig"],
            "mae_et.probing.nearest_neighbours": ["knn_accuracy"],
        },
    )
