"""Draw training views of the user's images as one image: `mae-et preview`.

Each row is a training view: the first samples of the first stage of each bandwidth, with their own
boxes, flips, augmentation and masks.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from torch import Tensor

from mae_et.config.schema import PretrainConfig
from mae_et.curriculum.plan import Plan, PlannedStage
from mae_et.data.datasets import open_dataset
from mae_et.data.encoder_input import encoder_input
from mae_et.data.sampler import CurriculumBatchSampler
from mae_et.data.train_dataset import TrainDataset
from mae_et.data.transforms import as_tensor
from mae_et.errors import Unreadable, UserError
from mae_et.io.atomic import refuse_unwritable
from mae_et.monitoring.image_grid import save_png
from mae_et.monitoring.preview import TrainingView, preview_image
from mae_et.runtime.console import notify
from mae_et.training.plan import make_plan, plan_new_run

ROWS = 6
"""Maximum number of rows; drawing them takes well under a second."""
ROWS_OF_A_STAGE = 3


def draw_preview(config: PretrainConfig, plan: Plan, dataset: TrainDataset) -> Tensor | None:
    """Draw training views, uint8 [3 H W]; None if the images cannot be read.

    Global random generators are left unchanged.
    """
    views = list(training_views(config, plan, dataset))
    return preview_image(views, config.data, config.model.patch) if views else None


def training_views(
    config: PretrainConfig, plan: Plan, dataset: TrainDataset
) -> Iterator[TrainingView]:
    """Yield the first readable views of the first stage of each bandwidth, at most `ROWS`."""
    firsts = {stage.bandwidth: stage for stage in reversed(plan.stages)}
    stages = sorted(firsts.values(), key=lambda stage: stage.start)[-ROWS:]
    for stage in stages:
        count = min(ROWS_OF_A_STAGE, ROWS // len(stages))
        yield from islice(_views_of(config, plan, dataset, stage), count)


def _views_of(
    config: PretrainConfig, plan: Plan, dataset: TrainDataset, stage: PlannedStage
) -> Iterator[TrainingView]:
    """Yield the readable views of a stage's first step."""
    sampler = CurriculumBatchSampler(
        plan,
        config.seed,
        start_step=stage.start,
        replay=config.data.replay,
        replay_images=config.data.replay_images,
    )
    for index in next(sampler.steps()).used:
        try:
            batch, original = dataset[index], as_tensor(dataset.source[index.sample][0])
        except Unreadable:
            continue
        images, mask = encoder_input(
            batch.images[None], batch.noise[None], stage.bandwidth, config.crop.method,
            config.model.mask_ratio, config.data,
        )  # fmt: skip
        box, flipped, _ = dataset.draw_view(index, *original.shape[-2:])
        yield TrainingView(stage, original, box, flipped, images, mask.hidden[0])


def preview(config: PretrainConfig, path: Path) -> Path:
    """Write the preview of a run as a PNG, without starting the run.

    Raises:
        UserError: the config or the data cannot be used, no image can be read, or the file cannot
            be written.
    """
    source = open_dataset(config.data, "train", config.model.channels)
    batch, images = config.optim.batch_size, len(source)
    if batch > images:
        notify(
            f"there are {images} images, fewer than optim.batch_size {batch}: batches of {images}"
        )
        config = replace(config, optim=replace(config.optim, batch_size=images))
    new = config.continues is None  # whose views do not depend on the budget
    plan = make_plan(config, images, stretch=True) if new else plan_new_run(config, images)
    drawn = draw_preview(config, plan, TrainDataset.from_config(config, source, plan))
    if drawn is None:
        raise UserError("none of the first images of the training split can be read")
    with refuse_unwritable(f"save {path}"):
        save_png(path, drawn)
    return path
