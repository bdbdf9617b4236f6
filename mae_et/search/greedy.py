"""EfficientTrain's search (ICCV 2023): the least bandwidths that still reach constant bandwidth.

Stages are of equal epochs. A run at full bandwidth sets the score to reach; then, for ever fewer
stages from the beginning, these take the smallest bandwidth with which a whole run reaches it. The
result is cheaper than constant bandwidth, by what the objective allows. Source: arXiv 2211.09703.
"""

from collections.abc import Sequence

from mae_et.errors import RunFailed
from mae_et.search.config import SearchConfig
from mae_et.search.found import Found
from mae_et.search.trials import Trial, Trials
from mae_et.training.plan import make_plan


def greedy(config: SearchConfig, images: int, trials: Trials) -> Found:
    """Return the curriculum that is found.

    Args:
        config: the search.
        images: size of the training set.
        trials: scores runs.

    Raises:
        UserError: the budget leaves a stage no step.
        RunFailed: constant bandwidth itself failed.
    """
    base = config.model.image_size
    best = whole_trial(config, images, [base] * config.search.stages)
    bandwidths = [base] * config.search.stages
    (baseline,) = trials.scores([best])
    if baseline == float("-inf"):
        raise RunFailed("training at constant bandwidth diverged: lower optim.base_lr")
    due = baseline - config.search.tolerance
    for count in range(config.search.stages - 1, 0, -1):
        smaller = [b for b in config.candidates if b < bandwidths[0]]
        curricula = [[bandwidth] * count + bandwidths[count:] for bandwidth in smaller]
        options = [whole_trial(config, images, each) for each in curricula]
        if trials.together and options:
            trials.scores(options)  # at once, although the larger ones may turn out not to be asked
        for option, curriculum in zip(options, curricula, strict=True):
            if trials.scores([option])[0] >= due:
                best, bandwidths = option, curriculum
                break
        if not config.search.keep_checkpoints:
            trials.discard([option for option in options if option is not best])
    return Found(config.stages_of(bandwidths), trials.score(best), best.name, "images")


def whole_trial(config: SearchConfig, images: int, bandwidths: Sequence[int]) -> Trial:
    """Return the trial of a whole curriculum of equal epochs."""
    name = "B" + "-".join(f"{bandwidth:03d}" for bandwidth in bandwidths)
    folder = config.output.dir / "trials" / name
    run = config.run_of(config.stages_of(bandwidths), config.budget, folder, "images")
    return Trial(run, make_plan(run, images))
