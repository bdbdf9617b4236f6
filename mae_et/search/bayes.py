"""Bayesian search of whole curricula at fixed compute, by Optuna's TPE sampler.

`space.py` defines the space. The first trial is constant bandwidth. The study is stored in
`optuna.jsonl`; the sampler is seeded for each trial by the number of earlier trials, so an
interrupted search makes the same proposals. A repeated proposal is replaced by the nearest untried
curriculum.
"""

from pathlib import Path

import optuna
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from mae_et.curriculum.plan import Plan
from mae_et.data.sampler import sample_seed
from mae_et.errors import RunFailed
from mae_et.search.config import SearchConfig
from mae_et.search.space import Space
from mae_et.search.trial_log import truncate_partial_line
from mae_et.search.trials import SearchResult, Trial, Trials

STUDY = "curriculum"
# Number of random trials before TPE proposes, and of scored trials before one may be pruned.
STARTUP_TRIALS = 5
TRIED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)

optuna.logging.set_verbosity(optuna.logging.WARNING)


def bayes(config: SearchConfig, images: int, trials: Trials) -> SearchResult:
    """Return the best curriculum."""
    study, space = open_study(config.output.dir), Space(config, images)
    prune_from = None if trials.parallel else config.search.prune_from
    while group := next_group(study, space, trials.parallel):
        runs = [space.trial(ask.params) for ask in group]
        if prune_from is None:
            scores = trials.scores(runs)
        else:
            scores = [
                train_with_pruning(trials, trial, ask, rungs(trial.plan, prune_from))
                for ask, trial in zip(group, runs, strict=True)
            ]
        for ask, score in zip(group, scores, strict=True):
            if score == float("-inf"):
                study.tell(ask, state=TrialState.PRUNED)
            else:
                study.tell(ask, score)
        if not config.search.keep_checkpoints:
            trials.delete_checkpoints(runs)
    if not study.get_trials(states=[TrialState.COMPLETE]):
        raise RunFailed("every trial diverged: lower optim.base_lr")
    best = study.best_trial
    return SearchResult(space.stages(best.params), space.trial(best.params), study.best_value)


# --- proposals ------------------------------------------------------------------------------------


def open_study(folder: Path) -> optuna.Study:
    """Open the study of a folder, or create it."""
    path = folder / "optuna.jsonl"
    truncate_partial_line(path)
    # The search folder is locked, so a lock file here was left by a killed process.
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
    return optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(path))),
        study_name=STUDY,
        direction="maximize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS),
        load_if_exists=True,
    )


def next_group(study: optuna.Study, space: Space, parallel: bool) -> list[optuna.Trial]:
    """Return the next trials: unscored ones of an earlier start, or new ones; empty at the end.

    With `parallel` a group has up to `search.at_once` trials, otherwise one.
    """
    group = []
    for frozen in study.get_trials(states=[TrialState.RUNNING]):
        if space.constant().keys() <= frozen.params.keys():
            group.append(optuna.Trial(study, frozen._trial_id))
        else:  # interrupted while it was proposed: the sampler proposes the same again
            study.tell(frozen.number, state=TrialState.FAIL)
    options = space.config.search
    count = options.at_once if parallel else 1
    while len(group) < count and len(study.get_trials(states=TRIED)) < options.trials:
        ask = propose(study, space)
        if ask is None:
            break
        group.append(ask)
    return group


def propose(study: optuna.Study, space: Space) -> optuna.Trial | None:
    """Return a trial of an untried point; None if every point was tried."""
    before = [trial.params for trial in study.get_trials(states=TRIED)]
    seed = sample_seed(space.config.seed, len(before))
    study.sampler = TPESampler(
        seed=seed % 2**32, n_startup_trials=STARTUP_TRIALS, constant_liar=True
    )
    if not before and not study.get_trials(states=[TrialState.WAITING]):
        study.enqueue_trial(space.constant())
    ask = study.ask()
    point = space.suggest(ask)
    if point not in before:
        return ask
    study.tell(ask, state=TrialState.FAIL)
    nearest = space.nearest(point, before, seed)
    if nearest is None:
        return None
    study.enqueue_trial(nearest)
    ask = study.ask()
    space.suggest(ask)
    return ask


# --- pruning --------------------------------------------------------------------------------------


def rungs(plan: Plan, prune_from: float) -> dict[int, int]:
    """Return the stages, except the last, after which a trial may be pruned, and their last steps.

    Trials are compared by stage: stages have equal compute in every trial, steps do not.
    """
    ends = {stage.index + 1: stage.start + stage.steps for stage in plan.stages[:-1]}
    return {stage: step for stage, step in ends.items() if plan.progress(step) >= prune_from}


def train_with_pruning(
    trials: Trials, trial: Trial, ask: optuna.Trial, steps: dict[int, int]
) -> float:
    """Train a trial from rung to rung and return its score; -inf if it is pruned or diverges.

    The scores at the rungs are logged like the final ones.
    """
    remaining: dict[int, int] = {} if trial.name in trials.known else steps
    for stage, step in remaining.items():
        value = trials.score_at(trial, step)
        if value is None:
            break  # it diverged, which is logged as its score
        if stage not in ask.storage.get_trial(ask._trial_id).intermediate_values:
            ask.report(value, stage)
        if ask.should_prune():
            trials.record(trial, None, f"pruned after stage {stage}, at {value:.2f}", step)
            break
    return trials.scores([trial])[0]
