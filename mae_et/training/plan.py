"""From a config and a data set's size to the plan of its run, before anything is trained."""

from functools import partial

from mae_et.config.schema import PretrainConfig, visible_patches
from mae_et.curriculum.schedule import Curriculum, Plan
from mae_et.errors import UserError


def curriculum_of(config: PretrainConfig) -> Curriculum:
    """Return a config's curriculum, once its smallest stage is known to leave something to do.

    Raises:
        UserError: see `Curriculum`; or the mask leaves no patch visible, or none hidden.
    """
    model = config.model
    curriculum = Curriculum.from_config(config.curriculum, model.image_size, model.patch)
    smallest = min(stage.bandwidth for stage in curriculum.stages)
    try:
        visible_patches((smallest // model.patch) ** 2, model.mask_ratio)
    except ValueError as error:
        raise UserError(f"model.mask_ratio at bandwidth {smallest}: {error}") from None
    return curriculum


def make_plan(
    config: PretrainConfig, dataset_size: int, curriculum: Curriculum | None = None
) -> Plan:
    """Resolve a config's curriculum for a data set.

    Raises:
        UserError: the curriculum, the batch and the data do not fit each other.
    """
    curriculum = curriculum or curriculum_of(config)
    batch, data = config.optim.batch_size, config.data
    if batch > dataset_size and data.name is None and data.root is None:
        raise UserError(
            f"optim.batch_size {batch} is larger than the data set of {dataset_size} images (the "
            "synthetic set, for want of data.root or data.name)"
        )
    cost = None
    if config.curriculum.cost == "flops":
        # Here, for `mae-et submit` checks curricula without PyTorch.
        import torch

        from mae_et.curriculum.flops import training_flops
        from mae_et.models.mae import MaskedAutoencoder

        with torch.device("meta"):
            model = MaskedAutoencoder.from_config(config.model)
        # A budget counts MAE's decoder as published, on every patch; that a step leaves out what
        # its loss does not read saves time, and must not lengthen the run. A share is a choice.
        published = config.model.decoder_attention == "self" and config.model.decoder_share == 1
        forward = partial(model, mask_ratio=config.model.mask_ratio, every_patch=published)
        cost = training_flops(forward, config.model.channels)
    return curriculum.plan(config.curriculum.epochs, dataset_size, batch, cost)
