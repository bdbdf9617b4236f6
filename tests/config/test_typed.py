from pathlib import Path

import numpy as np
import pytest

from finetune import HeldOutAccuracy, ProbeConfig
from mae_et import (
    CurriculumConfig,
    DataConfig,
    ModelConfig,
    OutputConfig,
    PretrainConfig,
    UserError,
)
from mae_et.config.files import plain
from mae_et.config.schema import OptimConfig
from mae_et.config.typed import typed


def test_configs_made_in_python_become_those_read_from_yaml() -> None:
    """Paths may be strings, tuples lists and numbers NumPy's; one that fits is returned itself."""
    proper = PretrainConfig(
        data=DataConfig(root=Path("photos"), mean=(0.5,), std=(0.5,)),
        output=OutputConfig(dir=Path("run")),
    )
    assert typed(proper, PretrainConfig) is proper
    loose = PretrainConfig(
        data=DataConfig(root="photos", mean=[0.5], std=[0.5]), output=OutputConfig(dir="run")
    )
    assert typed(loose, PretrainConfig) == proper
    of_numpy = OptimConfig(base_lr=np.float64(1e-3), batch_size=np.int64(32))
    run = typed(PretrainConfig(optim=of_numpy), PretrainConfig)
    assert plain(run.optim) == plain(OptimConfig(base_lr=1e-3, batch_size=32))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (ProbeConfig(Path("run"), pool="CLS"), "pool must be one of 'mean', 'cls', got CLS"),
        (ProbeConfig(Path("run"), device="cuda:0"), "device must be one of"),
        (PretrainConfig(curriculum=CurriculumConfig(cost="Area")), "curriculum.cost must be"),
        (ProbeConfig(Path("run"), neighbours=5.5), "neighbours must be a whole number"),
        (
            ModelConfig(target=print),
            "config: cannot represent an object: <built-in",
        ),
    ],
)
def test_misspelt_choices_are_refused_not_taken_for_another(config, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        typed(config, type(config))


def test_something_else_than_a_config_is_refused() -> None:
    with pytest.raises(UserError, match="config must be a ProbeConfig, got DataConfig"):
        typed(DataConfig(), ProbeConfig)


def test_objectives_are_refused_at_once() -> None:
    with pytest.raises(UserError, match="by must be one of 'knn', 'linear', got kNN"):
        HeldOutAccuracy(by="kNN")
    with pytest.raises(UserError, match=r"share must lie in \(0, 1\)"):
        HeldOutAccuracy(share=1.0)
