"""What tests of searches share: a search of seconds, and runs that are not trained."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from mae_et.checkpoints.store import save_checkpoint
from mae_et.config.files import to_yaml
from mae_et.config.schema import PretrainConfig

STRATEGIES = ("sequential", "greedy", "bayes")
SMALL = (
    "--curriculum.preset=etpp", "--curriculum.stages=[]", "--curriculum.epochs=6",
    "--curriculum.cost=area", "--search.candidates=[16,24,32]", "--search.stages=3",
    "--search.trials=6", "--search.finetune=0.2", "--optim.base_lr=0.005",
    "--output.tensorboard=false",
)  # fmt: skip


def pretend(configs: Sequence[PretrainConfig], stop_after_step: int | None = None) -> list[None]:
    """Write the files of each run that a search reads, without training."""
    for config in configs:
        folder, step = config.output.dir, stop_after_step or config.output.keep_every or 1
        state = {"model": {}, "optimizer": {"state": {}, "param_groups": []}, "scaler": {}}
        state |= {"step": step, "seconds": 0}
        save_checkpoint(folder / "checkpoints", state, to_yaml(config), {})
        (folder / "config.yaml").write_text(to_yaml(config))
        (folder / "metrics.jsonl").touch()
    return [None for _ in configs]


def stages_of(folder: Path, what: str = "bandwidth") -> list[int]:
    """Return the bandwidths (or magnitudes) of a trial's curriculum."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    return [stage[what] for stage in config["curriculum"]["stages"]]
