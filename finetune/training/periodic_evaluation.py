"""Score a classifier on the validation split during training, and keep its best weights."""

from typing import Any

from torch import nn

from finetune.scores import score
from finetune.training.results import read_scores, write_weights
from mae_et.config.duration import Duration
from mae_et.data.cores import worker_count
from mae_et.data.datasets import ImageDataset
from mae_et.monitoring.logger import RunLogger
from mae_et.runtime import distributed
from mae_et.training.nonfinite import check_state
from mae_et.training.periodic import Periodic
from mae_et.training.run import Run


class PeriodicEvaluation(Periodic):
    """Score a split every `output.evaluate_every` and at the end."""

    def __init__(self, run: Run, every: Duration, val: ImageDataset):
        super().__init__(run, every)
        self.val = val

    def do(self, logger: RunLogger | None) -> None:
        """Score the network (with optim.ema, its average and the raw weights), and keep the best.

        Raises:
            Diverged: the weights are not finite.
            Unreadable: an image cannot be read; a score on fewer images would not be comparable.
        """
        run = self.run
        ema = run.state.ema
        check_state(run)
        scores = self._score(run.state.model)
        if ema is not None:
            raw = {f"raw_{name}": scores[name] for name in ("top1", "top5", "val_loss")}
            scores = self._score(ema.module) | raw
        if logger is None:
            return
        folder = run.config.output.dir
        # Weights before scores: a resumed run redoes both if the scores are missing, and neither if
        # they are there.
        if scores["top1"] > max((row["top1"] for row in read_scores(folder)), default=-1.0):
            write_weights(run, folder / "best.safetensors")
        logger.log_scores(run.state.step, scores)

    def _score(self, network: nn.Module) -> dict[str, Any]:
        """Score a network on the validation split, over all ranks."""
        run, config = self.run, self.run.config
        distributed.broadcast_buffers(network, run.world)
        workers = worker_count(config.efficiency.num_workers, run.world)
        size, batch = config.model.image_size, run.micro_batch[run.plan.stages[-1].bandwidth]
        return score(
            network, self.val, config.data, size, run.world, run.dtype, batch, workers
        ).summary()
