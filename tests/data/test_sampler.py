import itertools
from collections import Counter

import pytest
import torch

from mae_et import Curriculum, Stage, UserError
from mae_et.data.sampler import (
    CurriculumBatchSampler,
    SampleIndex,
    StepSamples,
    permutation,
    sample_seed,
)
from mae_et.training.plan import micro_batch_size

PLAN = Curriculum((Stage(16, 1, 2), Stage(32, 1, 9)), 32, 8).plan(3, 50, 12)
# Two stages of 8 and 6 steps of 12 images.
REPLAYED = {"replay": {16: 3}, "replay_images": 10}


def draws(**where: int) -> list[list[SampleIndex]]:
    return list(
        CurriculumBatchSampler(
            PLAN, 0, micro_batch_size(None, PLAN, where.get("world_size", 1)), **where
        )
    )


def flat(parts) -> list[SampleIndex]:
    return list(itertools.chain.from_iterable(parts))


def test_every_epoch_is_a_permutation_and_batches_run_across_its_end() -> None:
    order = [draw for batch in draws() for draw in batch]
    assert len(order) == PLAN.images
    for epoch in range(PLAN.images // 50):
        window = order[50 * epoch : 50 * (epoch + 1)]
        assert sorted(draw.sample for draw in window) == list(range(50))
        assert {draw.epoch for draw in window} == {epoch}
    assert [d.sample for d in order[:50]] != [d.sample for d in order[50:100]]


def test_a_sample_has_the_stage_of_its_step() -> None:
    for step, batch in enumerate(draws()):
        assert {draw.stage for draw in batch} == {PLAN.at(step).index}


def test_ranks_together_draw_what_one_rank_draws() -> None:
    alone, ranks = draws(), [draws(rank=r, world_size=3) for r in range(3)]
    assert [flat(parts) for parts in zip(*ranks, strict=True)] == alone


@pytest.mark.parametrize("start", [0, 1, PLAN.stages[0].steps, PLAN.steps - 1, PLAN.steps])
def test_a_resumed_run_draws_the_remaining_samples(start: int) -> None:
    assert draws(start_step=start) == draws()[start:]


@pytest.mark.parametrize("requested", [None, 5, {16: 6, 32: 3}])
@pytest.mark.parametrize("start", [0, 2])
def test_micro_batches_divide_a_step_without_changing_its_samples(requested, start: int) -> None:
    batches = CurriculumBatchSampler(PLAN, 0, micro_batch_size(requested, PLAN, 2), 1, 2, start)
    parts = list(batches)
    assert len(batches) == len(parts)
    assert flat(parts) == flat(draws(rank=1, world_size=2, start_step=start))


def test_micro_batches_grow_as_images_shrink_and_divide_the_ranks_share() -> None:
    plan = Curriculum.preset("etpp", 224, 16).plan(10, 10_000, 4096)
    assert micro_batch_size(128, plan, 8) == {96: 512, 160: 128, 224: 128}  # of 696, 250 and 128
    with pytest.raises(UserError, match="not divisible by 3 ranks"):
        micro_batch_size(None, plan, 3)
    for requested in ({96: 64}, {96: 64, 160: 32, 224: 32, 256: 8}):
        with pytest.raises(UserError, match=r"the curriculum has \[96, 160, 224\]"):
            micro_batch_size(requested, plan, 8)


def test_seeds_of_neighbouring_keys_are_unrelated_and_fixed() -> None:
    assert sample_seed(0, 0, 0) == 1445694884619442965
    assert len({sample_seed(a, b, c) for a in range(5) for b in range(5) for c in range(5)}) == 125


def test_the_order_of_an_epoch_is_fixed_by_the_seed() -> None:
    assert permutation(10, 0, 0).tolist() == [4, 5, 8, 3, 1, 0, 7, 9, 6, 2]  # in every version
    assert not torch.equal(permutation(100, 0, 0), permutation(100, 1, 0))


def steps(start: int = 0, rank: int = 0, world: int = 1) -> list[StepSamples]:
    size = micro_batch_size(None, PLAN, world)
    return list(CurriculumBatchSampler(PLAN, 0, size, rank, world, start, **REPLAYED).steps())


@pytest.mark.parametrize("world", [1, 2])
def test_replay_completes_batches_with_the_latest_samples(world: int) -> None:
    for rank in range(world):
        loaded: list[SampleIndex] = []
        for step in steps(0, rank, world):
            replays = step.stage.bandwidth == 16
            assert len(step.used) == 12 // world
            assert len(step.loaded) == step.new == 12 // world // (3 if replays else 1)
            assert step.used[: step.new] == step.loaded
            loaded += step.loaded
            if replays:
                assert set(step.used[step.new :]) <= set(loaded[-10:])
        assert len(set(loaded)) == len(loaded)


def test_replay_uses_each_image_as_often_as_configured_on_average() -> None:
    first = PLAN.stages[0]
    uses = Counter(draw for step in steps()[: first.steps] for draw in step.used)
    assert sum(uses.values()) / len(uses) == 3
    third = [draw.sample for draw in steps()[2].used]  # the same in every version
    assert third == [43, 30, 0, 36, 4, 31, 0, 30, 31, 43, 31, 45]
    again = [tuple(step.used[step.new :]) for step in steps()[: first.steps]]
    assert len(set(again)) == len(again)


def test_replay_on_several_ranks_covers_the_dataset_in_epochs() -> None:
    ranks = [steps(0, rank, 2) for rank in range(2)]
    loaded = flat(flat(step.loaded for step in both) for both in zip(*ranks, strict=True))
    for epoch in range(len(loaded) // 50):
        window = loaded[50 * epoch : 50 * (epoch + 1)]
        assert sorted(draw.sample for draw in window) == list(range(50))


@pytest.mark.parametrize("start", [1, 3, 7, PLAN.stages[1].start, PLAN.steps - 1])
def test_a_resumed_replay_reloads_what_it_needs(start: int) -> None:
    whole, rest = steps()[start:], steps(start)
    assert [step.used for step in rest] == [step.used for step in whole]
    held: set[SampleIndex] = set()
    for step in rest:
        if step.stage.bandwidth != 16:
            assert step.used == step.loaded
            continue
        assert not held & set(step.loaded)
        held |= set(step.loaded)
        assert set(step.used) <= held
        held -= set(step.dropped)
        assert len(held) <= 10
    assert not held


def test_a_replay_buffer_smaller_than_a_step_keeps_nothing_longer() -> None:
    size = micro_batch_size(None, PLAN, 1)
    small = CurriculumBatchSampler(PLAN, 0, size, replay={16: 3}, replay_images=3)
    held: set[SampleIndex] = set()
    for step in small.steps():
        if step.stage.bandwidth == 16:
            held |= set(step.loaded)
            assert set(step.used) <= held
            held -= set(step.dropped)
            assert not held


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"replay": {24: 2}}, r"names the bandwidths \[24\], the curriculum has \[16, 32\]"),
        ({"replay": {16: 5}}, "5 uses"),
        ({"replay": {16: -2}}, "data.replay must be positive"),
        ({"replay": {16: 2}, "replay_images": 0}, "replay needs replay_images"),
        ({"rank": -1, "world_size": 2}, "rank -1 is not one of the 2 ranks from 0"),
        ({"rank": 2, "world_size": 2}, "rank 2 is not one of the 2 ranks from 0"),
        ({"micro_batch": 0}, "micro_batch must be positive, got 0"),
        ({"micro_batch": 5}, "micro_batch 5 does not divide the 12 images of a rank"),
        ({"micro_batch": {16: 6, 32: 4}, "world_size": 2}, "micro_batch 4 does not divide the 6"),
        ({"micro_batch": {16: 4}}, r"micro_batch lacks the bandwidths \[32\]"),
        ({"start_step": -1}, "start_step -1 is outside the plan's 31 steps"),
        ({"start_step": 32}, "start_step 32 is outside the plan's 31 steps"),
    ],
)
def test_arguments_that_do_not_fit_the_plan_are_refused(arguments, sentence: str) -> None:
    """Ranks counted from 1 would train on the samples of other steps."""
    with pytest.raises(UserError, match=sentence):
        CurriculumBatchSampler(PLAN, **{"replay_images": 10} | arguments)


@pytest.mark.parametrize("kept", [1, 4, 10, 30])
@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_the_length_with_replay_is_that_of_the_walk(kept: int, micro_batch: int) -> None:
    for start in range(PLAN.steps + 1):
        sampler = CurriculumBatchSampler(
            PLAN, 0, micro_batch, 1, 2, start, replay={16: 3, 32: 2}, replay_images=kept
        )
        assert len(sampler) == len(list(sampler)), start


def test_the_length_with_replay_needs_no_walk_of_all_steps() -> None:
    plan = Curriculum((Stage(16, 1, 2),), 32, 8).plan(10**8, 50, 12)
    assert len(CurriculumBatchSampler(plan, 0, start_step=7, **REPLAYED)) > 10**8
