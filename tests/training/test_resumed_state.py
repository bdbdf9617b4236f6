"""A resumed run has the plan, model and parameter groups of its config, whatever a file says."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sealing import seal_archive
from tiny_run import TINY

from mae_et import PretrainConfig, UserError, load_config, pretrain
from mae_et.checkpoints.store import list_checkpoints, load_checkpoint, newest_checkpoint


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> tuple[Any, Path]:
    """The config of a pre-training that stopped after five steps, and its only checkpoint."""
    folder = tmp_path_factory.mktemp("pretrain")
    (folder / "c.yaml").write_text(TINY)
    flags = [f"--output.dir={folder / 'run'}", "--output.tensorboard=false", "--output.keep_last=9",
             "--output.reconstruct_images=0"]  # fmt: skip
    config = load_config(PretrainConfig, [folder / "c.yaml"], flags)
    pretrain(config, stop_after_step=5)
    (path,) = list_checkpoints(folder / "run" / "checkpoints")
    return config, path


def reseal(path: Path, content: dict[str, Any]) -> None:
    """Write a content into a checkpoint's file, with a checksum that fits."""
    torch.save(content, path)
    seal_archive(path)


@pytest.mark.parametrize(
    ("change", "item"),
    [
        (
            lambda saved: saved["plan"]["stages"][-1].update(steps=10**6),
            "steps of stage 3: 1000000",
        ),
        (lambda saved: saved["plan"]["stages"][0].update(bandwidth=8), "bandwidth of stage 1: 8"),
        (lambda saved: saved["plan"]["stages"][0].update(magnitude=9.0), "magnitude of stage 1: 9"),
        (lambda saved: saved["plan"]["stages"][0].update(cost=1.0), "cost of stage 1: 1"),
        (lambda saved: saved["plan"].update(batch_size=6), "batch_size 6"),
        (lambda saved: saved["plan"].update(base=64), "base 64"),
        (lambda saved: saved["model"].pop("decoder.mask_token"), "1 missing"),
        (lambda saved: saved["model"].update(extra=torch.zeros(1)), "1 unexpected"),
    ],
)
def test_a_checkpoint_of_another_plan_or_model_is_refused(
    stopped, change: Callable[[dict[str, Any]], object], item: str
) -> None:
    config, path = stopped
    whole, content = path.read_bytes(), copy.deepcopy(load_checkpoint(path))
    change(content)
    reseal(path, content)
    try:
        with pytest.raises(UserError, match=item):
            pretrain(config)
        assert list_checkpoints(path.parent) == [path]
    finally:
        path.write_bytes(whole)


def test_parameter_groups_in_a_file_are_not_obeyed(stopped) -> None:
    config, path = stopped
    whole, content = path.read_bytes(), load_checkpoint(path)
    expected = newest_checkpoint(pretrain(config, stop_after_step=8) / "checkpoints")
    lies = {"lr_scale": 5.0, "eps": 1.0, "maximize": True, "betas": (0.0, 0.0), "amsgrad": True,
            "lr": 9.0, "weight_decay": 9.0, "decayed": False, "capturable": True}  # fmt: skip
    for group in content["optimizer"]["param_groups"]:
        group.update(lies)
    content["scaler"] = {"scale": 2.0, "_growth_tracker": 0, "growth_factor": 0.1}
    for each in list_checkpoints(path.parent):
        each.unlink()
    reseal(path, content)
    found = newest_checkpoint(pretrain(config, stop_after_step=8) / "checkpoints")
    assert found["step"] == expected["step"] == 8
    assert all(torch.equal(found["model"][name], each) for name, each in expected["model"].items())
    assert found["optimizer"]["param_groups"] == expected["optimizer"]["param_groups"]
    for each in list_checkpoints(path.parent):
        each.unlink()
    path.write_bytes(whole)
