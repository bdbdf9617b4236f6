"""Swin's windows follow the bandwidth, with one table of biases for all window sizes."""

import copy
import functools
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from steps import signal_at, train_with

from finetune import ClassifierConfig, classify
from finetune.config import NetworkConfig
from finetune.training.model import build_classifier
from finetune.training.param_groups import parameter_groups
from finetune.training.swin import resample_table
from mae_et import Interrupted, UserError, load_config

SWIN_T = "swin_tiny_patch4_window7_224"


@pytest.fixture(scope="module")
def swin():
    torch.manual_seed(0)
    return build_classifier(NetworkConfig(backbone=SWIN_T), 5).eval()


def blocks(network: torch.nn.Module) -> list:
    return [block for stage in network.layers for block in stage.blocks]


def randomised(name: str = SWIN_T, **settings) -> torch.nn.Module:
    """Build a network whose tables are not near zero."""
    network = build_classifier(NetworkConfig(backbone=name, **settings), 5).eval()
    for key, parameter in network.named_parameters():
        if "bias_table" in key:
            torch.nn.init.normal_(parameter)
    return network


@pytest.mark.parametrize(
    "name", [SWIN_T, "swinv2_tiny_window8_256", "swinv2_tiny_window16_256", "swinv2_cr_tiny_224"]
)
def test_no_zero_tokens_reach_attention(name: str) -> None:
    """The tokens of every window are the image's; padding would be zeros."""
    network = build_classifier(NetworkConfig(backbone=name), 5).eval()
    seen = []
    for path, module in network.named_modules():
        if path.endswith(".attn"):
            module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for height, width in ((96, 160), (224, 224)):
        with torch.no_grad():
            network(torch.randn(1, 3, height, width))
        windows = {getattr(block, "window_size", None) for block in network.modules()}
        assert (height // 32, width // 32) in windows
    assert len(seen) == 2 * 12
    assert all(tokens.abs().sum(dim=-1).min() > 0 for tokens in seen)


@pytest.mark.parametrize(("name", "size"), [(SWIN_T, 224), ("swinv2_tiny_window8_256", 256)])
def test_the_published_size_equals_timm_s_swin(name: str, size: int) -> None:
    ours = randomised(name, image_size=size)
    theirs = timm.create_model(name, num_classes=5).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(1, 3, size, size)
    with torch.no_grad():
        ours(torch.randn(1, 3, 96, 96))  # a smaller size in between changes nothing
        torch.testing.assert_close(ours(images), theirs(images))


@pytest.mark.parametrize("size", [96, 160])
def test_smaller_sizes_equal_timm_s_swin_with_resampled_tables(size: int) -> None:
    ours = randomised()
    window = (size // 32,) * 2
    theirs = timm.create_model(SWIN_T, num_classes=5, img_size=size, window_size=window[0]).eval()
    tables = {
        key: resample_table(tensor, (7, 7), window) if "bias_table" in key else tensor
        for key, tensor in ours.state_dict().items()
    }
    theirs.load_state_dict(tables)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images))


def test_every_entry_of_a_table_learns_at_every_window(swin) -> None:
    network = copy.deepcopy(swin)
    for size in (96, 160):
        network.zero_grad()
        network(torch.randn(2, 3, size, size)).square().sum().backward()
        tables = [p for name, p in network.named_parameters() if "bias_table" in name]
        assert all((table.grad != 0).all() for table in tables)
        assert {len(table) for table in tables} == {13**2}


def test_resampling_keeps_constants_and_the_order_of_heads() -> None:
    table = torch.arange(3.0).expand(13 * 13, 3).clone()
    found = resample_table(table, (7, 7), (3, 5))
    torch.testing.assert_close(found, torch.arange(3.0).expand(5 * 9, 3))
    torch.testing.assert_close(resample_table(table, (7, 7), (7, 7)), table)


def test_other_window_layouts_are_kept_and_other_sizes_refused() -> None:
    small = build_classifier(NetworkConfig(backbone="swin_s3_tiny_224"), 5).eval()
    with torch.no_grad():
        assert small(torch.randn(1, 3, 96, 96)).shape == (1, 5)
    with pytest.raises(UserError, match="image_size 100 is not a multiple of 32"):
        build_classifier(NetworkConfig(backbone=SWIN_T, image_size=100), 5)
    large = build_classifier(NetworkConfig(backbone=SWIN_T, image_size=384), 5)
    assert blocks(large)[0].window_size == (12, 12)


def test_bias_tables_are_decayed_as_in_the_release(swin) -> None:
    names = {id(p): name for name, p in swin.named_parameters()}
    decayed = {names[id(p)] for g in parameter_groups(swin, 0.05, 1.0)[:1] for p in g["params"]}
    assert sum("bias_table" in name for name in decayed) == 12
    assert not any(name.endswith("norm1.weight") for name in decayed)


def test_a_run_resumes_exactly_across_a_change_of_windows(tmp_path: Path, monkeypatch) -> None:
    """Stages at 32 and 64 pixels, windows of 1 and 2; stopped in the first, ended in the second."""
    narrow = functools.partial(timm.create_model, embed_dim=24, depths=(2, 2, 2, 2))
    monkeypatch.setattr(timm, "create_model", narrow)
    curriculum = (
        "--curriculum={preset: custom, epochs: 3, cost: area, shares_of: images, "
        "stages: [{bandwidth: 32, share: 2}, {bandwidth: 64, share: 1}]}"
    )

    def config(name: str) -> ClassifierConfig:
        return load_config(
            ClassifierConfig,
            [],
            [
                f"--model.backbone={SWIN_T}", "--model.image_size=64", "--model.drop_path=0.2",
                "--data.name=synthetic", "--data.synthetic_size=64", "--data.synthetic_train=4",
                "--data.synthetic_val=10", "--optim.batch_size=4", curriculum,
                "--efficiency={num_workers: 0, device: cpu}", "--output.tensorboard=false",
                f"--output.dir={tmp_path / name}", "--output.evaluate_every=null",
                "--output.checkpoint_every=100%", "--output.keep_last=1",
            ],
        )  # fmt: skip

    classify(config("whole"))
    with pytest.raises(Interrupted):
        train_with(signal_at(1), config("stopped"), classify)
    results = classify(config("stopped"))
    assert [stage["bandwidth"] for stage in results["stages"]] == [32, 64]
    whole, stopped = (
        load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped")
    )
    assert all(torch.equal(whole[key], stopped[key]) for key in whole)


def test_a_checkpoint_of_another_window_is_resampled_by_timm(tmp_path: Path) -> None:
    small = randomised(image_size=64)
    save_file(small.state_dict(), tmp_path / "model.safetensors")
    large = build_classifier(NetworkConfig(checkpoint=tmp_path, backbone=SWIN_T, image_size=96), 5)
    for key, tensor in large.state_dict().items():
        before = small.state_dict()[key]
        if "bias_table" not in key:
            assert torch.equal(tensor, before), key
            continue
        assert (len(before), len(tensor)) == (9, 25)
        assert torch.equal(
            tensor, timm.layers.resize_rel_pos_bias_table(before, (3, 3), tensor.shape)
        )
