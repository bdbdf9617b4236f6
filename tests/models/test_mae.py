import copy
import inspect
import pickle
import warnings

import pytest
import torch
from oracles import naive_mae
from randomised import randomised
from safetensors.torch import load_file
from small_mae import small
from tiny_run import GOLDEN

from mae_et import Mask, MaskedAutoencoder, UserError, load_pretrained, mask_from_noise
from mae_et.config.model import ModelConfig
from mae_et.models.mae import initialise


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "mae_tiny_expected.safetensors")


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("file", ["mae_tiny_released_format.pth", "mae_tiny_training_format.pth"])
@pytest.mark.parametrize("target", ["pixel", "norm_pix"])
def test_values_and_gradients_equal_the_golden_files(golden, file: str, target: str) -> None:
    model = load_pretrained(GOLDEN / file, encoder_num_heads=3, decoder_num_heads=4, target=target)
    mask = mask_from_noise(golden["noise"], 0.75)
    output = model(golden["images"], mask, every_patch=True)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(golden[f"{target}.loss"].item(), rel=1e-5)
    assert relative(output.prediction, golden[f"{target}.pred"]) < 1e-5
    assert relative(output.latent, golden["latent"]) < 1e-5
    assert torch.equal(mask.hidden, golden[f"{target}.mask"])
    parameters = dict(model.named_parameters())
    gradients = [name for name in golden if name.startswith(f"{target}.grad.")]
    assert len(gradients) == 4
    for name in gradients:
        theirs = name.removeprefix(f"{target}.grad.")
        part = "decoder." if "decoder" in theirs or theirs == "mask_token" else "encoder."
        ours = parameters[part + theirs.removeprefix("decoder_")]
        assert relative(ours.grad, golden[name]) < 1e-5


def test_unmasked_features_equal_the_golden_file_and_timm(golden) -> None:
    model = load_pretrained(GOLDEN / "mae_tiny_released_format.pth", 3, 4)
    features = model.encode(golden["images"])
    assert relative(features, golden["features_unmasked"]) < 1e-5
    assert relative(model.encoder.forward_features(golden["images"]), features) < 1e-5


@pytest.mark.parametrize("size", [(32, 32), (16, 16), (24, 40), (64, 32)])
def test_loss_equals_a_naive_autoencoder_on_any_grid(size: tuple[int, int]) -> None:
    model = small()
    images = torch.randn(2, 3, *size)
    noise = torch.rand(2, size[0] * size[1] // 64)
    mask = mask_from_noise(noise, 0.6)
    expected = torch.stack(
        [naive_mae(model, *pair, 0.6) for pair in zip(images, noise, strict=True)]
    )
    torch.testing.assert_close(model(images, mask).loss, expected.mean(), rtol=1e-5, atol=0)


def test_latent_does_not_depend_on_masked_patches() -> None:
    model = small()
    images, mask = torch.randn(1, 3, 32, 32), mask_from_noise(torch.rand(1, 16), 0.75)
    before = model(images, mask)
    hidden = mask.hidden.view(1, 1, 4, 4).repeat_interleave(8, -1).repeat_interleave(8, -2)
    after = model(images + hidden * torch.randn_like(images), mask)
    assert torch.equal(before.latent, after.latent)
    assert before.loss != after.loss


def test_all_bandwidths_share_all_weights() -> None:
    model = small()
    before = {name: p.shape for name, p in model.named_parameters()}
    for size in (16, 24, 32):
        model(torch.randn(2, 3, size, size)).loss.backward()
    assert {name: p.shape for name, p in model.named_parameters()} == before
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert set(before) - trained == {"encoder.pos_embed"}


@pytest.mark.parametrize("target", ["pixel", "norm_pix", "hog"])
def test_targets_of_any_dtype_are_float32_without_gradient(target: str) -> None:
    images = torch.randn(2, 3, 32, 32).bfloat16().requires_grad_()
    targets = small(target=target).targets(images)
    assert targets.dtype == torch.float32
    assert not targets.requires_grad


@pytest.mark.parametrize("target", ["pixel", "norm_pix", "hog"])
@pytest.mark.parametrize("channels", [1, 4, 13])
def test_every_target_supports_any_number_of_channels(target: str, channels: int) -> None:
    model = small(channels=channels, target=target)
    output = model(torch.randn(2, channels, 32, 24), every_patch=True)
    assert output.loss.isfinite()
    assert output.prediction.shape == model.targets(torch.randn(2, channels, 32, 24)).shape


def test_target_and_loss_are_float32_under_autocast() -> None:
    model = small(target="hog")
    images, mask = torch.randn(2, 3, 32, 32), mask_from_noise(torch.rand(2, 16), 0.75)
    expected = model(images, mask).loss
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images, mask)
        assert torch.equal(model.targets(images), model.targets(images).float())
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(expected.item(), rel=0.02)


@pytest.mark.parametrize("attention", ["self", "cross"])
@pytest.mark.parametrize("every_patch", [True, False])
def test_weights_in_bfloat16_compute_in_it_without_autocast(
    attention: str, every_patch: bool
) -> None:
    model = small(decoder_attention=attention)
    images, mask = torch.randn(2, 3, 32, 32), mask_from_noise(torch.rand(2, 16), 0.75)
    expected = model(images, mask, every_patch=every_patch).loss
    output = model.bfloat16()(images.bfloat16(), mask, every_patch=every_patch)
    assert output.prediction.dtype == torch.bfloat16
    assert output.loss.item() == pytest.approx(expected.item(), rel=0.02)


def test_initial_weights_follow_mae_and_depend_on_the_seed_only() -> None:
    weights, again = small().state_dict(), small().state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    trained = randomised(small())
    initialise(trained)
    for name, weight in (*weights.items(), *trained.state_dict().items()):
        if name.endswith("bias"):
            assert not weight.any(), name
        elif "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight)), name
        elif "token" in name:
            assert 0.01 < weight.std() < 0.03, name
        elif "pos_embed" not in name:  # uniform within Xavier's bound, and reaching close to it
            fan_out, fan_in = weight.flatten(1).shape
            bound = (6 / (fan_in + fan_out)) ** 0.5
            assert 0.95 * bound < weight.abs().max() <= bound, name


def test_defaults_are_those_of_the_config() -> None:
    parameters = inspect.signature(MaskedAutoencoder).parameters
    assert [*parameters] == [*ModelConfig.__dataclass_fields__]
    for name, parameter in parameters.items():
        assert parameter.default == getattr(ModelConfig(), name), name


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("vit_huge", "cannot build"), ("hf-hub:some/body", "cannot build"),
     ("vit_tiny_r_s16_p8_224", "not a plain"), ("resnet18", "is not a plain vision transformer"),
     ("vit_base_patch16_siglip_224", "class token"), ("vit_base_patch32_clip_224", "not a plain"),
     ("vit_small_patch14_reg4_dinov2", "not a plain")],
)  # fmt: skip
def test_encoders_other_than_plain_vits_raise(name: str, sentence: str) -> None:
    with torch.device("meta"), pytest.raises(UserError, match=sentence):
        MaskedAutoencoder(name)


def test_the_cause_of_a_failure_to_build_the_encoder_is_kept() -> None:
    with pytest.raises(UserError, match="cannot build the encoder") as caught:
        MaskedAutoencoder("vit_tiny_patch16_224", image_size="224")  # type: ignore[arg-type]
    assert isinstance(caught.value.__cause__, TypeError)


@pytest.mark.slow  # PyTorch imports sympy
def test_an_exported_model_takes_batches_of_any_size() -> None:
    model, batch = small().eval(), torch.export.Dim("batch")
    given = torch.randn(2, 3, 32, 32), mask_from_noise(torch.rand(2, 16), 0.75)
    shapes = {0: batch}, Mask({0: batch}, None)
    exported = torch.export.export(model, given, dynamic_shapes=shapes, strict=False).module()
    more = torch.randn(5, 3, 32, 32), mask_from_noise(torch.rand(5, 16), 0.75)
    torch.testing.assert_close(exported(*more)[0], model(*more).loss)


def test_gradients_per_image_average_to_those_of_the_batch() -> None:
    model, images, noise = small(), torch.randn(3, 3, 32, 32), torch.rand(3, 16)
    weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(weights: dict, image: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        mask = mask_from_noise(noise[None], 0.75)
        return torch.func.functional_call(model, weights, (image[None], mask)).loss

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weights, images, noise)
    model(images, mask_from_noise(noise, 0.75)).loss.backward()
    for name, gradient in each.items():
        own = model.get_parameter(name).grad
        torch.testing.assert_close(gradient.mean(0), own, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 9), (2, 36), (1, 16)])
@pytest.mark.parametrize("method", ["forward", "encode"])
def test_a_mask_of_other_patches_raises(shape: tuple[int, int], method: str) -> None:
    """As of a loop whose transform has another patch size: patches would never be masked."""
    mask, images = mask_from_noise(torch.rand(shape), 0.75), torch.randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match=r"mask is of \[.*\] patches, the images have \[2, 16\]"):
        getattr(small(), method)(images, mask)


def test_loading_positions_that_encode_does_not_use_warns() -> None:
    model = small()
    own = model.encoder.state_dict()
    with warnings.catch_warnings(action="error"):
        model.load_state_dict(small().bfloat16().state_dict())
        small(position_grid=6).load_state_dict(small(position_grid=6).state_dict())
    with pytest.warns(UserWarning, match="encode computes whatever is loaded"):
        model.encoder.load_state_dict(own | {"pos_embed": torch.randn_like(own["pos_embed"])})
    copy.deepcopy(pickle.loads(pickle.dumps(model)))


def test_a_mask_is_drawn_with_the_model_s_ratio_or_the_given_one() -> None:
    model, images = small(mask_ratio=0.5), torch.randn(2, 3, 32, 32)
    assert [model(images, ratio).mask.visible for ratio in (None, 0.75)] == [8, 4]
    assert not torch.equal(*model(images).mask.order)  # one mask for each image


def test_own_grid_positions_equal_those_of_a_model_of_that_size() -> None:
    """The comparison for full-grid positions: treat a crop as an image of that size."""
    torch.manual_seed(1)
    crops, mask = torch.randn(2, 3, 16, 16), mask_from_noise(torch.rand(2, 4), 0.5)
    model, alone = small(positions="own_grid"), small(image_size=16)
    weights = model.state_dict()
    del weights["encoder.pos_embed"]  # the table kept for timm; the model computes its own
    for other in (alone, on_the_full_grid := small()):
        assert other.load_state_dict(weights, strict=False).missing_keys == ["encoder.pos_embed"]
    expected = alone(crops, mask).loss
    assert torch.equal(model(crops, mask).loss, expected)
    assert not torch.equal(on_the_full_grid(crops, mask).loss, expected)
