"""Decoders: computing only what the loss reads does not change the loss."""

import json
from collections import Counter

import pytest
import torch
from randomised import randomised
from small_mae import small
from tiny_run import config_in

from mae_et import MaskedAutoencoder, UserError, mask_from_noise, pretrain
from mae_et.checkpoints.writers.export import export
from mae_et.models.decoders import CrossBlock, SelfBlock, gather


def gradients(model: MaskedAutoencoder, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["self", "cross"])
@pytest.mark.parametrize("depth", [1, 3])
def test_training_step_has_the_loss_and_gradients_of_predicting_every_patch(
    attention: str, depth: int
) -> None:
    model = small(decoder_attention=attention, decoder_depth=depth)
    torch.nn.init.normal_(model.decoder.norm.weight)
    images, noise = torch.randn(3, 3, 32, 24), torch.rand(3, 12)
    mask = mask_from_noise(noise, 0.7)
    whole, step = (model(images, mask, every_patch=each) for each in (True, False))
    hidden = 12 - 3
    assert whole.prediction.shape == (3, 12, 192)
    assert step.prediction.shape == (3, hidden, 192)
    masked = noise.argsort(dim=1)[:, 3:]
    torch.testing.assert_close(gather(whole.prediction, masked), step.prediction)
    torch.testing.assert_close(whole.loss, step.loss)
    theirs = gradients(model, whole.loss)
    ours = gradients(model, model(images, mask).loss)
    assert theirs.keys() == ours.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_shortened_block_gives_the_end_of_the_whole_block_s_tokens() -> None:
    block = randomised(SelfBlock(16, 2, qk_norm=True, init_values=0.5))
    tokens = torch.randn(2, 7, 16)
    torch.testing.assert_close(block(tokens, 3), block(tokens)[:, -3:])


def test_cross_block_is_cross_attention_and_an_mlp_with_norms_before_each() -> None:
    block = randomised(CrossBlock(16, 2))
    attention = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    with torch.no_grad():
        for ours, theirs in (("weight", "in_proj_weight"), ("bias", "in_proj_bias")):
            parts = [getattr(layer, ours) for layer in (block.query, block.key_value)]
            getattr(attention, theirs).copy_(torch.cat(parts))
    attention.out_proj.load_state_dict(block.proj.state_dict())
    queries, context = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    normed = block.norm_context(context)
    attended = queries + attention(block.norm1(queries), normed, normed)[0]
    expected = attended + block.mlp(block.norm2(attended))
    torch.testing.assert_close(block(queries, context), expected)
    assert block.mlp.fc1.out_features == 4 * 16


def test_cross_decoder_predicts_each_patch_independently() -> None:
    """So predicting half of them gives the same predictions as predicting all."""
    images, mask = torch.randn(2, 3, 32, 32), mask_from_noise(torch.rand(2, 16), 0.75)
    whole, part = (
        small(decoder_attention="cross", decoder_share=share)(images, mask).prediction
        for share in (1.0, 0.5)
    )
    assert part.shape[1] == 6
    torch.testing.assert_close(whole[:, :6], part)


@pytest.mark.parametrize(("share", "count"), [(0.34, 4), (0.5, 6), (0.01, 1)])
def test_decoder_share_limits_the_loss_to_that_fraction_of_the_masked_patches(share, count) -> None:
    model = small(decoder_share=share)
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    output = model(images, mask_from_noise(noise, 0.75))
    masked = noise.argsort(dim=1)[:, 4 : 4 + count]
    target = gather(model.targets(images), masked)
    torch.testing.assert_close(output.loss, (output.prediction - target).square().mean())


@pytest.mark.parametrize("attention", ["self", "cross"])
@pytest.mark.parametrize("every_patch", [True, False])
def test_gradient_checkpointing_recomputes_each_block_and_changes_no_bit(
    attention: str, every_patch: bool
) -> None:
    model = small(decoder_attention=attention, decoder_depth=2)
    images, mask = torch.randn(2, 3, 32, 32), mask_from_noise(torch.rand(2, 16), 0.75)
    passes: Counter[torch.nn.Module] = Counter()
    for block in (*model.encoder.blocks, *model.decoder.blocks):
        block.register_forward_pre_hook(lambda module, _: passes.update([module]))
    before = gradients(model, model(images, mask, every_patch=every_patch).loss)
    assert list(passes.values()) == [1] * 4
    model.set_gradient_checkpointing()
    after = gradients(model, model(images, mask, every_patch=every_patch).loss)
    assert list(passes.values()) == [3] * 4  # recomputed in the backward pass
    for name, gradient in before.items():
        assert torch.equal(after[name], gradient), name


def test_export_to_the_layout_of_mae_rejects_a_cross_decoder(tmp_path) -> None:
    flags = ["--model.decoder_attention=cross", "--model.decoder_share=0.5"]
    run = pretrain(config_in(tmp_path, *flags), stop_after_step=1)
    with pytest.raises(UserError, match="cross"):
        export(run, "mae", tmp_path / "mae.pth")
    export(run, "timm", tmp_path / "timm.safetensors")
    export(run, "hf", tmp_path / "hf")  # the encoder alone
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["ViTModel"]
