"""Flags and patterns are read in linear time: small inputs never take long."""

from collections.abc import Callable
from functools import partial

import pytest
from fuzz.watch import within

from mae_et import UserError
from mae_et.cli.main import main
from mae_et.config.data import DataConfig
from mae_et.search.config import SearchOptions
from slurm.config import ClusterConfig

soon = partial(within, 3.0)


def objective(text: str) -> None:
    SearchOptions(objective=text)


PATTERNS: dict[str, tuple[Callable[[str], object], Callable[[int], str]]] = {
    "augment": (lambda text: DataConfig(augment=text), lambda n: "rand" + "-a1" * n + "-!"),
    "augment digits": (lambda text: DataConfig(augment=text), lambda n: "rand-" + "1" * n + "-!"),
    "augment dots": (lambda text: DataConfig(augment=text), lambda n: "rand-a" + "1." * n + "!"),
    "objective": (objective, lambda n: "a." * n + "!"),
    "time": (lambda text: ClusterConfig(time=text), lambda n: "1" * n + "-!"),
    "sbatch option": (lambda text: ClusterConfig(extra={text: 1}), lambda n: "a-" * n + "!"),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_are_linear(name: str) -> None:
    check, text = PATTERNS[name]
    for n in (30, 3_000, 30_000):
        with soon(), pytest.raises(UserError):
            check(text(n))


ABSURD = {
    "model.encoder_depth": "must lie in [1, 1000]",
    "model.decoder_depth": "must lie in [1, 1000]",
    "efficiency.num_workers": "must lie in [0, 1024]",
    "optim.batch_size": "is larger than the dataset",
    "data.synthetic_size": "array is too big",
}


@pytest.mark.parametrize("key", ABSURD)
def test_absurd_sizes_are_refused_before_memory_is_taken(place, capsys, key: str) -> None:
    with soon():
        assert main(["plan", "--config=tiny.yaml", f"--{key}=1000000000"]) == 2
    assert ABSURD[key] in capsys.readouterr().err


def test_sweep_of_more_runs_than_a_cluster_takes_is_refused(place, capsys) -> None:
    values = ",".join(map(str, range(1, 1001)))
    sweep = [f"--sweep={key}={values}" for key in ("seed", "optim.batch_size", "optim.base_lr")]
    with soon():
        assert main(["submit", "pretrain", "--config=tiny.yaml", "--dry-run", *sweep]) == 2
    assert "--sweep makes 1000000000 runs; at most 1000 are submitted" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["rand", "rand-mstd0.5-inc1", "rand-n2-w0", "rand-p0.5-tweak"])
def test_valid_augmentation_names_are_accepted(name: str) -> None:
    assert DataConfig(augment=name).augment == name
    with pytest.raises(UserError, match="the stage gives the magnitude"):
        DataConfig(augment=f"{name}-m9")
