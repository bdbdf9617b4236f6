"""EfficientTrain++'s search: stage by stage, every candidate for the same compute.

For each stage in order, every bandwidth is trained for the stage's share of the compute, from the
state that the stages before it ended with, and then for a short while at full bandwidth; the best
one is kept, and the next stage starts from where it was before that short training. The cost is
linear in stages times candidates. Source: arXiv 2405.08768.

All runs branch off one line, so the learning rate must not depend on where a line will end: it
rises, stays, and falls over the short training alone (`optim.decay_fraction`).
"""

from dataclasses import replace

from mae_et.config.schema import Stage
from mae_et.curriculum.schedule import Plan
from mae_et.errors import RunFailed, UserError
from mae_et.search.config import SearchConfig
from mae_et.search.found import Found
from mae_et.search.trials import Fork, Trial, Trials
from mae_et.training.plan import make_plan


def sequential(config: SearchConfig, images: int, trials: Trials) -> Found:
    """Return the curriculum that is found.

    Args:
        config: the search.
        images: size of the training set.
        trials: scores runs.

    Raises:
        UserError: the budget leaves a stage no step, or the warm-up does not fit the first.
        RunFailed: every candidate of a stage failed.
    """
    chosen: list[int] = []
    parent: Trial | None = None
    for place in range(config.search.stages):
        options = [stage_trial(config, images, chosen, b, parent) for b in config.candidates]
        scores = trials.scores(options)
        best = scores.index(max(scores))  # of equals the smallest bandwidth: it sees more images
        if max(scores) == float("-inf"):
            raise RunFailed(f"every candidate of stage {place + 1} diverged: lower optim.base_lr")
        if not config.search.keep_checkpoints:
            losers = [trial for trial in options if trial is not options[best]]
            trials.discard([*losers, *([parent] if parent else [])])
        chosen.append(config.candidates[best])
        parent = options[best]
    assert parent is not None
    return Found(config.stages_of(chosen), trials.score(parent), parent.name)


def stage_trial(
    config: SearchConfig, images: int, chosen: list[int], bandwidth: int, parent: Trial | None
) -> Trial:
    """Return the trial of a bandwidth for the stage after those that are chosen.

    Raises:
        UserError: the budget leaves it no step, or the warm-up does not fit it.
    """
    place, options = len(chosen), config.search
    of_stage, of_tuning = config.budget / options.stages, config.budget * options.finetune
    total = of_stage * (place + 1) + of_tuning
    shown = config.stages_of([*chosen, bandwidth])
    tuning = Stage(config.model.image_size, of_tuning, shown[-1].magnitude)
    stages = (*(replace(stage, share=of_stage) for stage in shown), tuning)
    warmup, decay = config.optim.warmup_fraction * config.budget / total, of_tuning / total
    if warmup + decay > 1:
        raise UserError(
            f"optim.warmup_fraction {config.optim.warmup_fraction:g} is longer than the first "
            f"of the {options.stages} stages (search.stages); lower either"
        )
    folder = config.output.dir / "trials" / f"stage-{place + 1:02d}-B{bandwidth:03d}"
    run = config.run_of(stages, total, folder)
    run = replace(run, optim=replace(run.optim, warmup_fraction=warmup, decay_fraction=decay))
    plan = make_plan(run, images)
    start = None
    if parent is not None:
        plan = after(parent.plan, place, plan)
        start = Fork(parent.folder, plan.stages[place].start)
    # The next stage starts from here.
    end = plan.stages[-1].start
    run = replace(run, output=replace(run.output, keep_every=end))
    return Trial(run, plan, start)


def after(before: Plan, count: int, plan: Plan) -> Plan:
    """Return a plan whose first stages are those of another, to the step.

    Each plan rounds its own budget; what is already trained must not be rounded again.
    """
    stages, start = list(before.stages[:count]), before.stages[count].start
    for stage in plan.stages[count:]:
        stages.append(replace(stage, start=start))
        start += stage.steps
    return replace(plan, stages=tuple(stages))
