"""EfficientTrain's search (ICCV 2023): the smallest bandwidths that match constant bandwidth.

All stages have equal epochs. A run at full bandwidth sets the target score. Then, with n decreasing
to 1, the first n stages get the smallest bandwidth with which a full run reaches the target. The
result costs less than constant bandwidth. Source: arXiv 2211.09703.
"""

from mae_et.errors import RunFailed
from mae_et.search.config import SearchConfig
from mae_et.search.trials import SearchResult, Trial, Trials, whole_trial


def greedy(config: SearchConfig, images: int, trials: Trials) -> SearchResult:
    """Return the best curriculum."""

    def trial(bandwidths: list[int]) -> Trial:
        return whole_trial(config, images, config.stages_of(bandwidths), "images")

    best = trial([config.model.image_size] * config.search.stages)
    (baseline,) = trials.scores([best])
    if baseline == float("-inf"):
        raise RunFailed("training at constant bandwidth diverged: lower optim.base_lr")
    target = baseline - config.search.tolerance
    for count in range(config.search.stages - 1, 0, -1):
        before, bandwidths = best, [stage.bandwidth for stage in best.plan.stages]
        smaller = [b for b in config.candidates if b < bandwidths[0]]
        options = [trial([bandwidth] * count + bandwidths[count:]) for bandwidth in smaller]
        if trials.parallel and options:
            trials.scores(options)  # all at once, although the larger ones may not be needed
        best = next((each for each in options if trials.scores([each])[0] >= target), before)
        if not config.search.keep_checkpoints:
            trials.delete_checkpoints([each for each in (before, *options) if each is not best])
    return SearchResult(best.config.curriculum.stages, best, trials.score(best))
