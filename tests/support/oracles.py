"""Plain re-statements of the method, slow and short, that the code is held against."""

import numpy as np
import torch
from torch import Tensor, nn


def fft_crop(images: np.ndarray, bandwidth: int) -> np.ndarray:
    """Crop the centred spectrum with numpy's FFT in float64, [..., H, W] -> [..., B, B]."""
    height, width = images.shape[-2:]
    spectrum = np.fft.fftshift(np.fft.fft2(images), axes=(-2, -1))
    top, left = height // 2 - bandwidth // 2, width // 2 - bandwidth // 2
    window = spectrum[..., top : top + bandwidth, left : left + bandwidth]
    cropped = np.fft.ifft2(np.fft.ifftshift(window, axes=(-2, -1)))
    return cropped.real * bandwidth**2 / (height * width)


def naive_mae(model: nn.Module, image: Tensor, noise: Tensor, mask_ratio: float) -> Tensor:
    """Return the loss of one image [C H W], written out patch by patch with timm's modules."""
    encoder, decoder, p = model.encoder, model.decoder, model.patch
    rows, columns = image.shape[1] // p, image.shape[2] // p
    embedded = encoder.patch_embed.proj(image[None])[0]  # [D h w]
    order = sorted(range(rows * columns), key=lambda i: noise[i].item())
    visible = order[: int(rows * columns * (1 - mask_ratio))]
    tokens = [encoder.cls_token[0, 0]]
    for i in visible:
        r, c = divmod(i, columns)
        tokens.append(
            embedded[:, r, c] + naive_position(r, c, (rows, columns), model, encoder.embed_dim)
        )
    x = encoder.norm(encoder.blocks(torch.stack(tokens)[None]))
    y = decoder.embed(x)[0]
    tokens = [y[0]]
    for i in range(rows * columns):
        r, c = divmod(i, columns)
        token = y[1 + visible.index(i)] if i in visible else decoder.mask_token[0, 0]
        tokens.append(token + naive_position(r, c, (rows, columns), model, y.shape[1]))
    predicted = decoder.pred(decoder.norm(decoder.blocks(torch.stack(tokens)[None])))[0, 1:]
    errors = []
    for i in order[len(visible) :]:
        r, c = divmod(i, columns)
        patch = image[:, r * p : (r + 1) * p, c * p : (c + 1) * p].permute(1, 2, 0).flatten()
        target = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
        errors.append((predicted[i] - target).square().mean())
    return torch.stack(errors).mean()


def naive_position(r: int, c: int, grid: tuple[int, int], model: nn.Module, width: int) -> Tensor:
    """Return the sine-cosine position of one patch: the column's half, then the row's."""
    quarter = width // 4
    halves = []
    for index, count, full in ((c, grid[1], model.base_grid[1]), (r, grid[0], model.base_grid[0])):
        place = (index + 0.5) * full / count - 0.5
        angles = [place / 10000 ** (k / quarter) for k in range(quarter)]
        halves += [np.sin(angles), np.cos(angles)]
    return torch.from_numpy(np.concatenate(halves)).float()


def mae_flops(
    bandwidth: int, patch: int, width: int, depth: int, decoder: int, decoder_depth: int
) -> int:
    """FLOPs of one image's training step, counted by hand: three passes, three quarters hidden.

    Two for each multiplication: of the patches, of attention, of the MLPs of both halves.
    """
    patches = (bandwidth // patch) ** 2
    tokens, all_tokens = 1 + patches // 4, 1 + patches

    def blocks(n: int, d: int) -> int:
        return n * 12 * d * d + 2 * n * n * d

    products = patches // 4 * 3 * patch**2 * width + depth * blocks(tokens, width)
    products += tokens * width * decoder + decoder_depth * blocks(all_tokens, decoder)
    products += all_tokens * decoder * 3 * patch**2
    return 3 * 2 * products
