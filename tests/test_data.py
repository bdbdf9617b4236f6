import itertools
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from mae_et import Curriculum, Stage, UserError
from mae_et.config import DataConfig
from mae_et.curriculum import Plan
from mae_et.data import (
    Draw,
    EvalView,
    PlannedBatches,
    TrainView,
    eval_loader,
    micro_batch_size,
    normalise,
    permutation,
    sample_seed,
    seeded,
    train_loader,
    worker_count,
)
from mae_et.synthetic import Synthetic

PLAN = Curriculum((Stage(16, 1, 2), Stage(32, 1, 9)), 32, 8).plan(3, 50, 12)
SOURCE = Synthetic(50, 32)


def view(augment: str | None = None, seed: int = 0, plan: Plan = PLAN) -> TrainView:
    return TrainView(SOURCE, DataConfig(augment=augment), plan, 8, seed)


def draws(**where: int) -> list[list[Draw]]:
    return list(
        PlannedBatches(PLAN, 0, micro_batch_size(None, PLAN, where.get("world", 1)), **where)
    )


def flat(parts) -> list[Draw]:
    return list(itertools.chain.from_iterable(parts))


def test_every_epoch_is_a_permutation_and_batches_run_across_its_end() -> None:
    order = [draw for batch in draws() for draw in batch]
    assert len(order) == PLAN.images
    for epoch in range(PLAN.images // 50):
        window = order[50 * epoch : 50 * (epoch + 1)]
        assert sorted(draw.sample for draw in window) == list(range(50))
        assert {draw.epoch for draw in window} == {epoch}
    assert [d.sample for d in order[:50]] != [d.sample for d in order[50:100]]


def test_the_stage_of_a_sample_is_that_of_its_step() -> None:
    for step, batch in enumerate(draws()):
        assert {draw.stage for draw in batch} == {PLAN.at(step).index}


def test_ranks_split_each_batch_and_together_draw_what_one_process_draws() -> None:
    alone, ranks = draws(), [draws(rank=r, world=3) for r in range(3)]
    assert [flat(parts) for parts in zip(*ranks, strict=True)] == alone


@pytest.mark.parametrize("start", [0, 1, PLAN.stages[0].steps, PLAN.steps - 1, PLAN.steps])
def test_a_run_that_goes_on_draws_what_is_left(start: int) -> None:
    assert draws(start=start) == draws()[start:]


@pytest.mark.parametrize("asked", [None, 5, {16: 6, 32: 3}])
@pytest.mark.parametrize("start", [0, 2])
def test_micro_batches_divide_a_step_and_are_counted_rightly(asked, start: int) -> None:
    batches = PlannedBatches(PLAN, 0, micro_batch_size(asked, PLAN, 2), 1, 2, start)
    parts = list(batches)
    assert len(batches) == len(parts)
    assert flat(parts) == flat(draws(rank=1, world=2, start=start))


def test_a_micro_batch_grows_as_images_shrink_and_divides_a_process_s_share() -> None:
    plan = Curriculum.preset("etpp", 224, 16).plan(10, 10_000, 4096)
    size = micro_batch_size(128, plan, 8)
    assert [size(b) for b in (224, 160, 96)] == [128, 128, 512]  # 128, 250 and 696 of 512
    with pytest.raises(UserError, match="not divided by 3 processes"):
        micro_batch_size(None, plan, 3)
    for asked in ({96: 64}, {96: 64, 160: 32, 224: 32, 256: 8}):
        with pytest.raises(UserError, match=r"the curriculum has \[96, 160, 224\]"):
            micro_batch_size(asked, plan, 8)


def test_a_sample_is_a_function_of_seed_epoch_and_index_alone() -> None:
    first = view()[Draw(7, 1, 1)]
    random.seed(1)
    torch.manual_seed(1)
    again = view()[Draw(7, 1, 1)]
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.noise, again.noise)
    for other in (view()[Draw(7, 2, 1)], view(seed=1)[Draw(7, 1, 1)], view()[Draw(8, 1, 1)]):
        assert not torch.equal(first.images, other.images)
        assert not torch.equal(first.noise, other.noise)


def test_a_sample_keeps_its_crop_from_stage_to_stage_and_gets_noise_for_the_stage_s_grid() -> None:
    early, late = view()[Draw(3, 0, 0)], view()[Draw(3, 0, 1)]
    assert torch.equal(early.images, late.images)
    assert early.images.dtype == torch.uint8
    assert early.images.shape == (3, 32, 32)
    assert (early.noise.shape, late.noise.shape) == ((4,), (16,))


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_changes_nothing(workers: int) -> None:
    batches = PlannedBatches(PLAN, 0, micro_batch_size(4, PLAN, 1))
    alone = list(train_loader(view("rand-mstd0.5-inc1"), batches, 0, False))
    spread = list(train_loader(view("rand-mstd0.5-inc1"), batches, workers, False))
    assert len(alone) == len(batches)
    for one, other in zip(alone, spread, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.noise, other.noise)


def test_augmentation_has_the_stage_s_magnitude() -> None:
    """At magnitude 0 RandAugment's operations do little."""
    plan = Curriculum((Stage(16, 1, 0), Stage(32, 1, 10)), 32, 8).plan(3, 50, 12)
    plain, augmented = view(plan=plan), view("rand-inc1", plan=plan)

    def change(stage: int) -> float:
        pairs = [
            (v[Draw(i, 0, stage)].images.float() for v in (plain, augmented)) for i in range(30)
        ]
        return float(np.mean([(a - b).abs().mean() for a, b in pairs]))

    assert change(stage=1) > 1.3 * change(stage=0)


@pytest.mark.parametrize("augment", ["rand-foo1", "rand-n2.5"])
def test_an_augmentation_that_timm_does_not_know_is_refused(augment: str) -> None:
    with pytest.raises(UserError, match=r"timm knows no augmentation 'rand-m2-"):
        view(augment)


def test_seeding_leaves_the_caller_s_generators_alone() -> None:
    torch.manual_seed(0)
    random.seed(0)
    expected = torch.rand(1).item(), random.random()
    torch.manual_seed(0)
    random.seed(0)
    with seeded(5):
        drawn = torch.rand(1).item()
    assert (torch.rand(1).item(), random.random()) == expected
    with seeded(5):
        assert torch.rand(1).item() == drawn


def test_seeds_of_neighbouring_keys_are_unrelated_and_fixed() -> None:
    assert sample_seed(0, 0, 0) == 1445694884619442965
    assert len({sample_seed(a, b, c) for a in range(5) for b in range(5) for c in range(5)}) == 125


def test_an_evaluation_view_is_the_resized_centre() -> None:
    image = Image.new("RGB", (100, 50))
    image.paste((255, 0, 0), (25, 0, 75, 50))  # the central square

    class One:
        classes = ("a",)
        __len__: Callable = lambda self: 1
        __getitem__: Callable = lambda self, i: (image, 0)

    pixels, label = EvalView(One(), DataConfig(eval_crop=1.0), 32)[0]
    assert (pixels.shape, label) == ((3, 32, 32), 0)
    assert pixels[0].min() > 240
    batches = list(eval_loader(EvalView(SOURCE, DataConfig(), 32), 16, 0))
    assert [len(labels) for _, labels in batches] == [16, 16, 16, 2]


def test_normalising_gives_the_asked_for_statistics() -> None:
    images = torch.randint(0, 256, (4, 2, 8, 8), dtype=torch.uint8)
    ours = normalise(images, (0.5, 0.1), (0.25, 2.0))
    torch.testing.assert_close(ours[:, 1], (images[:, 1] / 255 - 0.1) / 2.0)
    floats = torch.rand(1, 2, 4, 4)
    torch.testing.assert_close(normalise(floats, (0.5,), (0.5,)), (floats - 0.5) / 0.5)


def test_the_order_of_an_epoch_is_fixed_by_the_seed() -> None:
    assert torch.equal(permutation(10, 0, 0), permutation(10, 0, 0))
    assert not torch.equal(permutation(100, 0, 0), permutation(100, 1, 0))
    assert worker_count(3) == 3
    assert 1 <= worker_count(None) <= 16
