"""Build a run without training it."""

import torch

from mae_et.runtime.distributed import DistributedContext
from mae_et.training.build import build_run
from mae_et.training.run import Run
from mae_et.training.task import Task

ALONE = DistributedContext(0, 1, torch.device("cpu"))


def build(task: Task, world: DistributedContext = ALONE, images: int = 40) -> Run:
    """Build the run of a task on a number of training images."""
    torch.manual_seed(task.config.seed)
    model, _ = task.build_model(None, world)
    return build_run(task, model, task.make_plan(model, images), world)
