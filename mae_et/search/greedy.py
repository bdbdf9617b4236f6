"""EfficientTrain's search (ICCV 2023): the smallest bandwidths that match constant bandwidth.

All stages have equal epochs. A run at full bandwidth sets the target score. Then, with n decreasing
to 1, the first n stages get the smallest bandwidth with which a full run reaches the target. The
result costs less than constant bandwidth. Source: arXiv 2211.09703.
"""

from collections.abc import Sequence

from mae_et.errors import RunFailed
from mae_et.search.config import SearchConfig
from mae_et.search.trials import SearchResult, Trial, Trials
from mae_et.training.plan import make_plan


def greedy(config: SearchConfig, images: int, trials: Trials) -> SearchResult:
    """Return the best curriculum.

    Raises:
        UserError: the budget is too small for a step in each stage.
        RunFailed: the run at constant bandwidth diverged.
    """
    base = config.model.image_size
    best = full_trial(config, images, [base] * config.search.stages)
    bandwidths = [base] * config.search.stages
    (baseline,) = trials.scores([best])
    if baseline == float("-inf"):
        raise RunFailed("training at constant bandwidth diverged: lower optim.base_lr")
    target = baseline - config.search.tolerance
    for count in range(config.search.stages - 1, 0, -1):
        before = best
        smaller = [b for b in config.candidates if b < bandwidths[0]]
        curricula = [[bandwidth] * count + bandwidths[count:] for bandwidth in smaller]
        options = [full_trial(config, images, each) for each in curricula]
        if trials.parallel and options:
            trials.scores(options)  # all at once, although the larger ones may not be needed
        for option, curriculum in zip(options, curricula, strict=True):
            if trials.scores([option])[0] >= target:
                best, bandwidths = option, curriculum
                break
        if not config.search.keep_checkpoints:
            trials.delete_checkpoints([each for each in (before, *options) if each is not best])
    return SearchResult(config.stages_of(bandwidths), trials.score(best), best.name, "images")


def full_trial(config: SearchConfig, images: int, bandwidths: Sequence[int]) -> Trial:
    """Return the trial of a curriculum whose stages have equal epochs."""
    name = "B" + "-".join(f"{bandwidth:03d}" for bandwidth in bandwidths)
    folder = config.output.dir / "trials" / name
    run = config.run_of(config.stages_of(bandwidths), config.budget, folder, "images")
    return Trial(run, make_plan(run, images))
