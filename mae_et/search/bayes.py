"""Search whole curricula under a fixed compute by Optuna's tree-structured Parzen estimator.

The space is in `space.py`. The first trial is constant bandwidth. Optuna's study lies in
`optuna.jsonl`; the sampler is seeded for each trial by how many are before it, so that a search
that was stopped proposes what it would have proposed. What is proposed a second time is put aside
for the nearest curriculum that was not tried.
"""

from pathlib import Path
from typing import Any

from mae_et.curriculum.schedule import Plan
from mae_et.data.sampler import sample_seed
from mae_et.errors import RunFailed, UserError
from mae_et.search.config import SearchConfig
from mae_et.search.found import Found
from mae_et.search.journal import drop_half_line
from mae_et.search.space import Space
from mae_et.search.trials import Trial, Trials

STUDY = "curriculum"
# Random ones before the estimator proposes; scored ones before a trial may be pruned.
STARTUP_TRIALS = 5


def bayes(config: SearchConfig, images: int, trials: Trials) -> Found:
    """Return the curriculum that is found.

    Args:
        config: the search.
        images: size of the training set.
        trials: scores runs.

    Raises:
        UserError: Optuna is missing, or the budget leaves a stage no step.
        RunFailed: every trial failed.
    """
    optuna = import_optuna()
    states = optuna.trial.TrialState
    study, space = open_study(optuna, config.output.dir), Space(config, images)
    prune_from = None if trials.together else config.search.prune_from
    while group := next_group(optuna, study, space, trials.together):
        runs = [space.trial(ask.params) for ask in group]
        if prune_from is None:
            scores = trials.scores(runs)
        else:
            scores = [
                settled(trials, trial, ask, rungs(trial.plan, prune_from))
                for ask, trial in zip(group, runs, strict=True)
            ]
        for ask, score in zip(group, scores, strict=True):
            if score == float("-inf"):
                study.tell(ask, state=states.PRUNED)
            else:
                study.tell(ask, score)
        if not config.search.keep_checkpoints:
            trials.discard(runs)
    if not study.get_trials(states=[states.COMPLETE]):
        raise RunFailed("every trial diverged: lower optim.base_lr")
    best = study.best_trial
    trial = space.trial(best.params)
    return Found(space.stages(best.params), best.value, trial.name)


# --- proposals ------------------------------------------------------------------------------------


def import_optuna() -> Any:
    """Return Optuna, told to be quiet.

    Raises:
        UserError: it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise UserError(
            "search.strategy bayes needs the extra search: pip install '.[search]' (in the clone)"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def open_study(optuna: Any, folder: Path) -> Any:
    """Open the study in a folder, or begin it."""
    from optuna.storages.journal import JournalFileBackend

    path = folder / "optuna.jsonl"
    drop_half_line(path)
    # The folder is locked, so a lock that lies there is of a process that was killed.
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
    return optuna.create_study(
        storage=optuna.storages.JournalStorage(JournalFileBackend(str(path))),
        study_name=STUDY,
        direction="maximize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS),
        load_if_exists=True,
    )


def tried(study: Any, *states: str) -> list[Any]:
    """Return the trials that are in a state; by default those that count: scored, or running."""
    wanted = states or ("COMPLETE", "PRUNED", "RUNNING")
    return [trial for trial in study.trials if trial.state.name in wanted]


def next_group(optuna: Any, study: Any, space: Space, together: bool) -> list[Any]:
    """Return the trials to be scored next: those asked for before, or new ones; none at the end."""
    group = []
    for frozen in tried(study, "RUNNING"):
        if space.is_whole(frozen.params):
            group.append(optuna.trial.Trial(study, frozen._trial_id))
        else:  # cut off while it was proposed: the same is proposed again
            study.tell(frozen.number, state=optuna.trial.TrialState.FAIL)
    options = space.config.search
    count = options.at_once if together else 1
    while len(group) < count and len(tried(study)) < options.trials:
        ask = proposed(optuna, study, space)
        if ask is None:
            break
        group.append(ask)
    return group


def proposed(optuna: Any, study: Any, space: Space) -> Any | None:
    """Return a trial of parameters that were not tried; None where all were."""
    before = [trial.params for trial in tried(study)]
    seed = sample_seed(space.config.seed, len(before))
    study.sampler = optuna.samplers.TPESampler(
        seed=seed % 2**32, n_startup_trials=STARTUP_TRIALS, constant_liar=True
    )
    if not tried(study, "WAITING") and not before:
        study.enqueue_trial(space.constant())
    ask = study.ask()
    parameters = space.suggest(ask)
    if parameters not in before:
        return ask
    study.tell(ask, state=optuna.trial.TrialState.FAIL)
    nearest = space.nearest(parameters, before, seed)
    if nearest is None:
        return None
    study.enqueue_trial(nearest)
    ask = study.ask()
    space.suggest(ask)
    return ask


# --- scores ---------------------------------------------------------------------------------------


def rungs(plan: Plan, prune_from: float) -> dict[int, int]:
    """Return the stages after which a trial is judged, the last one left out, and their last steps.

    Stages are of equal compute, so trials are compared after as much of it; steps are not.
    """
    ends = {stage.index + 1: stage.start + stage.steps for stage in plan.stages[:-1]}
    return {stage: step for stage, step in ends.items() if plan.progress(step) >= prune_from}


def settled(trials: Trials, trial: Trial, ask: Any, steps: dict[int, int]) -> float:
    """Train a trial from judgement to judgement, and return its score; -inf where it is given up.

    The scores on the way are in the journal, as the final ones are.

    Raises:
        Interrupted: a signal asked to stop.
    """
    judged: dict[int, int] = {} if trial.name in trials.known else steps
    for stage, step in judged.items():
        value = trials.score_at(trial, step)
        if value is None:
            break  # it diverged, which is its score
        if stage not in ask.storage.get_trial(ask._trial_id).intermediate_values:
            ask.report(value, stage)
        if ask.should_prune():
            trials.settle(trial, None, f"given up after stage {stage}, at {value:.2f}", step)
            break
    return trials.scores([trial])[0]
