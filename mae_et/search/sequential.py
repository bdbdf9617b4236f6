"""EfficientTrain++'s search: stage by stage, all candidates at equal compute.

Each candidate bandwidth of a stage is trained for the stage's share of the compute, starting from
the end of the previous stage, and then briefly at full bandwidth. The best candidate is kept; the
next stage starts from its state before that brief training. The cost is linear in stages times
candidates. Source: arXiv 2405.08768.

Later stages are unknown during training, so the learning rate must not depend on the total length:
it warms up, stays constant, and decays only over the brief training (`optim.decay_fraction`).
"""

from dataclasses import replace

from mae_et.config.schema import Stage
from mae_et.curriculum.plan import Plan
from mae_et.errors import RunFailed, UserError
from mae_et.search.config import SearchConfig
from mae_et.search.trials import Fork, SearchResult, Trial, Trials
from mae_et.training.plan import make_plan


def sequential(config: SearchConfig, images: int, trials: Trials) -> SearchResult:
    """Return the best curriculum."""
    chosen: list[int] = []
    parent: Trial | None = None
    for place in range(config.search.stages):
        options = [stage_trial(config, images, chosen, b, parent) for b in config.candidates]
        scores = trials.scores(options)
        best = scores.index(max(scores))  # ties: the smallest bandwidth, which sees more images
        if max(scores) == float("-inf"):
            raise RunFailed(f"every candidate of stage {place + 1} diverged: lower optim.base_lr")
        if not config.search.keep_checkpoints:
            losers = [trial for trial in options if trial is not options[best]]
            trials.delete_checkpoints([*losers, *([parent] if parent else [])])
        chosen.append(config.candidates[best])
        parent = options[best]
    assert parent is not None
    return SearchResult(config.stages_of(chosen), parent, trials.score(parent))


def stage_trial(
    config: SearchConfig, images: int, chosen: list[int], bandwidth: int, parent: Trial | None
) -> Trial:
    """Return the trial of a candidate bandwidth for the stage after the chosen ones."""
    place, options = len(chosen), config.search
    stage_epochs = config.budget / options.stages
    tuning_epochs = config.budget * options.finetune
    total = stage_epochs * (place + 1) + tuning_epochs
    shown = config.stages_of([*chosen, bandwidth])
    tuning = Stage(config.model.image_size, tuning_epochs, shown[-1].magnitude)
    stages = (*(replace(stage, share=stage_epochs) for stage in shown), tuning)
    warmup, decay = config.optim.warmup_fraction * config.budget / total, tuning_epochs / total
    if warmup + decay > 1:
        raise UserError(
            f"optim.warmup_fraction {config.optim.warmup_fraction:g} is longer than the first "
            f"of the {options.stages} stages (search.stages); lower either of them"
        )
    folder = config.output.dir / "trials" / f"stage-{place + 1:02d}-B{bandwidth:03d}"
    run = config.run_of(stages, total, folder)
    run = replace(run, optim=replace(run.optim, warmup_fraction=warmup, decay_fraction=decay))
    plan = make_plan(run, images)
    start = None
    if parent is not None:
        plan = with_trained_stages(parent.plan, place, plan)
        start = Fork(parent.folder, plan.stages[place].start)
    # Keep the checkpoint from which the next stage starts.
    end = plan.stages[-1].start
    run = replace(run, output=replace(run.output, keep_every=end))
    return Trial(run, plan, start)


def with_trained_stages(trained: Plan, count: int, plan: Plan) -> Plan:
    """Replace the first `count` stages of a plan by the stages that were trained.

    Each plan rounds its own budget to steps; trained stages must keep their number of steps.
    """
    stages, start = list(trained.stages[:count]), trained.stages[count].start
    for stage in plan.stages[count:]:
        stages.append(replace(stage, start=start))
        start += stage.steps
    return replace(plan, stages=tuple(stages))
