"""The commands of `mae-et` by name, in the order of `mae-et --help`."""

from collections.abc import Callable

from mae_et.cli import bench, files, planning, scores, slurm_jobs, training
from mae_et.cli.arguments import Arguments
from mae_et.cli.completion import completion
from mae_et.cli.configs import configs

COMMANDS: dict[str, Callable[[Arguments], None]] = {
    "demo": training.demo,
    "configs": configs,
    "plan": planning.plan,
    "preview": files.preview,
    "pretrain": training.pretrain,
    "finetune": training.finetune,
    "supervised": training.supervised,
    "evaluate": scores.evaluate,
    "knn": scores.knn,
    "linear-probe": scores.linear_probe,
    "embed": files.embed,
    "reconstruct": files.reconstruct,
    "export": files.export,
    "prepare": files.prepare,
    "compare": files.compare,
    "report": files.report,
    "search": planning.search,
    "dynamics": scores.dynamics,
    "bench": bench.bench,
    "submit": slurm_jobs.submit,
    "status": slurm_jobs.status,
    "completion": completion,
}

DISTRIBUTED = frozenset({"pretrain", "finetune", "supervised", "evaluate"})
"""Commands that torchrun may start once for each GPU."""
