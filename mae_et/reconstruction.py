"""Reconstruct masked images with a checkpoint, and write them as a PNG."""

from pathlib import Path

import torch

from mae_et.checkpoints.formats import load_weights
from mae_et.checkpoints.load import masked_autoencoder
from mae_et.checkpoints.preprocessing import report_preprocessing
from mae_et.checkpoints.source import recognise
from mae_et.config.commands import ReconstructConfig
from mae_et.config.data import DataConfig, check_statistics
from mae_et.data.batch import in_one_dtype
from mae_et.data.datasets import open_dataset
from mae_et.data.encoder_input import encoder_input
from mae_et.data.sources.image_folder import open_image_files
from mae_et.data.transforms import EvalDataset
from mae_et.errors import UserError
from mae_et.io.atomic import refuse_unwritable
from mae_et.monitoring.image_grid import save_png
from mae_et.monitoring.reconstructions import panel_grid, reconstruction_panels
from mae_et.runtime.distributed import choose_device


def reconstruct(config: ReconstructConfig) -> Path:
    """Write a PNG of images, masked, reconstructed and pasted, and return its path.

    Raises:
        UserError: the checkpoint has no decoder, the images or the bandwidth cannot be used, or the
            output cannot be written to.
    """
    if recognise(config.checkpoint).kind == "classifier":
        raise UserError(f"{config.checkpoint} is a classifier's run, not a masked autoencoder's")
    weights = load_weights(config.checkpoint, config.checkpoint_key)
    weights = weights.with_given(config.encoder_num_heads, config.decoder_num_heads, config.target)
    run = weights.config
    model = masked_autoencoder(weights)
    if model.decoder is None:
        raise UserError(f"{config.checkpoint} has no decoder: it cannot reconstruct")
    if run is None and not config.images:
        raise UserError("images must be given for a checkpoint that is not a run of mae-et")
    size = model.base_grid[0] * model.patch
    bandwidth = config.bandwidth or size
    if bandwidth % model.patch or not 0 < bandwidth <= size:
        raise UserError(
            f"bandwidth {bandwidth} must be a multiple of the patch size {model.patch} and at most "
            f"the base size {size}"
        )
    data = run.data if run else DataConfig()
    if run is None and weights.preprocessing is not None:
        data = DataConfig(**weights.preprocessing.data_settings())
    check_statistics(data, model.channels)
    if config.images:
        source = open_image_files(config.images, model.channels, data.max_value)
        # The user's own images keep their whole shorter side.
        view = EvalDataset(source, DataConfig(eval_crop=1.0), size)
    else:
        view = EvalDataset(open_dataset(data, "val", model.channels), data, size)
    report_preprocessing(weights.preprocessing, data, config.checkpoint)
    device = choose_device(config.device)
    generator = torch.Generator().manual_seed(config.seed)
    # Chosen at random, because a labelled folder lists its first class first.
    chosen = torch.randperm(len(view), generator=generator)[: config.count].tolist()
    pixels = torch.stack(in_one_dtype([view[place][0] for place in sorted(chosen)])).to(device)
    method = run.crop.method if run else "fourier"
    noise = torch.rand(len(pixels), (bandwidth // model.patch) ** 2, generator=generator).to(device)
    try:
        mask_ratio = config.mask_ratio or model.mask_ratio
        pixels, mask = encoder_input(pixels, noise, bandwidth, method, mask_ratio, data)
        panels = reconstruction_panels(model.to(device), pixels, mask, data)
    except ValueError as error:
        raise UserError(str(error)) from error
    with refuse_unwritable(f"output {config.output}"):
        save_png(config.output, panel_grid(panels, model.target))
    return config.output
