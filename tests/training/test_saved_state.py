"""A checkpoint whose checksum fits, and whose content cannot be right, is refused in a sentence."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import CLASSIFIER as CLASSIFIER_YAML
from tiny_run import TINY

from finetune import ClassifierConfig, classify
from mae_et import PretrainConfig, UserError, load_config, pretrain
from mae_et.checkpoints.checksums import seal_archive
from mae_et.checkpoints.store import list_checkpoints, load_checkpoint, newest_checkpoint

Change = Callable[[dict[str, Any]], object]
Case = tuple[Change, str]
NAN, INF = float("nan"), float("inf")


def entry(*keys: Any, value: Any) -> Change:
    """Return a change that sets an entry of a checkpoint."""

    def change(saved: dict[str, Any]) -> None:
        *path, last = keys
        for key in path:
            saved = saved[key]
        saved[last] = value

    return change


def without(*keys: Any) -> Change:
    """Return a change that deletes an entry of a checkpoint."""

    def change(saved: dict[str, Any]) -> None:
        *path, last = keys
        for key in path:
            saved = saved[key]
        del saved[last]

    return change


def tensor(*keys: Any, to: Callable[[torch.Tensor], Any]) -> Change:
    """Return a change of one tensor of a checkpoint."""

    def change(saved: dict[str, Any]) -> None:
        *path, last = keys
        for key in path:
            saved = saved[key]
        saved[last] = to(saved[last].clone())

    return change


def filled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that sets a tensor's first number."""

    def fill(given: torch.Tensor) -> torch.Tensor:
        given.view(-1)[0] = value
        return given

    return fill


WEIGHT, MOMENTS = ("model", "decoder.mask_token"), ("optimizer", "state", 0)
COMMON: list[Case] = [
    (entry("step", value=19), "step"),
    (entry("step", value=-1), "step"),
    (entry("step", value=NAN), "step"),
    (entry("step", value=5.0), "step"),
    (entry("step", value=True), "step"),
    (entry("step", value="5"), "step"),
    (entry("step", value=None), "step"),
    (entry("step", value=10**30), "step"),
    (without("step"), "step is missing"),
    (entry("seconds", value=NAN), "seconds"),
    (entry("seconds", value=INF), "seconds"),
    (entry("seconds", value=-1.0), "seconds"),
    (entry("seconds", value="long"), "seconds"),
    (without("seconds"), "seconds is missing"),
    (entry("config", value=b"seed: 0"), "config"),
    (entry("config", value="seed: [0"), "version of mae-et"),
    (without("config"), "config is missing"),
    (entry("plan", value=[]), "plan"),
    (entry("plan", value={}), "plan cannot be right"),
    (without("plan"), "plan is missing"),
    (entry("plan", "stages", value=()), "plan cannot be right"),
    (entry("plan", "stages", 0, "steps", value=10**6), "plan"),
    (entry("plan", "stages", 0, "bandwidth", value=8), "bandwidth"),
    (entry("plan", "stages", 0, "magnitude", value=9.0), "magnitude"),
    (entry("plan", "stages", 0, "cost", value=NAN), "plan cannot be right"),
    (entry("plan", "stages", 0, "cost", value=1.0), "cost"),
    (entry("plan", "stages", 0, "cost", value="x"), "plan cannot be right"),
    (entry("plan", "stages", 0, "other", value=1), "plan cannot be right"),
    (entry("plan", "batch_size", value=6), "batch_size 6"),
    (entry("plan", "batch_size", value=0), "plan cannot be right"),
    (entry("plan", "dataset_size", value=41), "images"),
    (entry("plan", "base", value=64), "base 64"),
    (entry("plan", "base_cost", value=-1.0), "plan cannot be right"),
    (entry("model", value=None), "model"),
    (entry("model", value={}), "missing"),
    (entry("model", "extra", value=torch.zeros(1)), "unexpected"),
    (entry("model", 3, value=torch.zeros(1)), "model cannot be right"),
    (entry("optimizer", value=None), "optimizer"),
    (entry("optimizer", value={"state": {}}), "optimizer"),
    (entry("optimizer", "state", value={}), "no moments"),
    (entry("optimizer", "state", value=[]), "optimizer cannot be right"),
    (entry("optimizer", "param_groups", value=[]), "parameter groups"),
    (entry("optimizer", "param_groups", 0, "params", value=[0]), "parameter groups"),
    (entry("optimizer", "param_groups", 0, "params", value="all"), "optimizer cannot be right"),
    (without("optimizer", "param_groups", 1), "parameter groups"),
    (without(*MOMENTS), "no moments"),
    (without(*MOMENTS, "exp_avg"), "moments"),
    (entry(*MOMENTS, "max_exp_avg_sq", value=torch.zeros(1)), "moments"),
    (entry(*MOMENTS, "exp_avg", value=1.0), "optimizer cannot be right"),
    (entry("optimizer", "state", 9999, value={}), "moments"),
    (tensor(*MOMENTS, "exp_avg", to=filled(INF)), "exp_avg of parameter 0 is not finite"),
    (
        tensor(*MOMENTS, "exp_avg", to=torch.Tensor.double),
        "parameter 0 is torch.float64",
    ),
    (tensor(*MOMENTS, "exp_avg", to=torch.Tensor.flatten), "moments"),
    (tensor(*MOMENTS, "exp_avg_sq", to=filled(-1.0)), "exp_avg_sq of parameter 0 is negative"),
    (tensor(*MOMENTS, "step", to=filled(-3.0)), "step of parameter 0 is negative"),
    (tensor(*MOMENTS, "step", to=filled(NAN)), "step of parameter 0 is not finite"),
    (tensor(*MOMENTS, "step", to=filled(1e6)), "step of parameter 0 is 1e\\+06, beyond"),
    (tensor(*MOMENTS, "step", to=torch.Tensor.long), "step of parameter 0 is torch.int64"),
    (entry("scaler", value=None), "scaler"),
    (entry("scaler", value={"scale": 0.0, "_growth_tracker": 0}), "loss scale is 0.0"),
    (entry("scaler", value={"scale": NAN, "_growth_tracker": 0}), "loss scale is nan"),
    (entry("scaler", value={"scale": 2.0, "_growth_tracker": -1}), "growth tracker is -1"),
    (entry("micro_batch", value=6), "micro_batch"),
    (entry("micro_batch", value={16: 0, 24: 6, 32: 6}), "micro_batch cannot be right"),
    (entry("micro_batch", value={16: 2.5}), "micro_batch cannot be right"),
    (entry("micro_batch", value={8: 6}), "micro-batches are for bandwidths \\[8\\]"),
    (entry("origin", value=[]), "origin"),
    (entry("origin", "processes", value=0), "origin"),
    (entry("origin", "data", value=3), "origin"),
    (entry("origin", "decode", value="tape"), "origin"),
    (entry("origin", "decode_cpu_sides", value=(None,)), "origin"),
]
PRETRAINING: list[Case] = [
    (tensor(*WEIGHT, to=filled(NAN)), "mask_token is not finite"),
    (tensor(*WEIGHT, to=torch.Tensor.double), "mask_token is torch.float64, not torch.float32"),
    (tensor(*WEIGHT, to=torch.Tensor.half), "mask_token is torch.float16"),
    (tensor(*WEIGHT, to=torch.Tensor.flatten), "misshapen"),
    (without(*WEIGHT), "mask_token"),
    (entry(*WEIGHT, value=None), "model cannot be right"),
    (tensor(*WEIGHT, to=torch.Tensor.to_sparse), "model cannot be right"),
    (tensor(*WEIGHT, to=lambda t: t.to("meta")), "model cannot be right"),
    (tensor(*WEIGHT, to=lambda t: torch.quantize_per_tensor(t, 1, 0, torch.qint8)), "model canno"),
    (tensor(*WEIGHT, to=lambda t: t.to(torch.complex64)), "mask_token is torch.complex64"),
    (tensor(*WEIGHT, to=lambda t: t > 0), "mask_token is torch.bool"),
    (entry("micro_batch", value={16: 6, 24: 6, 32: 13}), "micro-batch of 13 images"),
]
CLASSIFIER: list[Case] = [
    (entry("ema", value=None), "no moving average"),
    (entry("ema", value=[]), "ema cannot be right"),
    (entry("ema", "extra", value=torch.zeros(1)), "moving average"),
    (tensor("ema", "module.fc.bias", to=filled(NAN)), "module.fc.bias is not finite"),
    (tensor("model", "fc.bias", to=lambda t: t[:-1]), "misshapen"),
    (tensor("model", "bn1.running_var", to=filled(NAN)), "bn1.running_var is not finite"),
    (tensor("model", "bn1.num_batches_tracked", to=torch.Tensor.float), "torch.float32"),
]


def stopped_run(folder: Path, command: str) -> tuple[Any, Path]:
    """Train for five steps; return the config and the checkpoint."""
    torch.set_num_threads(1)
    (folder / "c.yaml").write_text(TINY if command == "pretrain" else CLASSIFIER_YAML)
    flags = [f"--output.dir={folder / 'run'}", "--output.tensorboard=false", "--output.keep_last=9"]
    if command == "pretrain":
        flags.append("--output.reconstruct_images=0")
        config: Any = load_config(PretrainConfig, [folder / "c.yaml"], flags)
        pretrain(config, stop_after_step=5)
    else:
        flags += ["--optim.ema=0.9", "--output.checkpoint_every=5", "--output.evaluate_every=null"]
        config = load_config(ClassifierConfig, [folder / "c.yaml"], flags)
        classify(config)
        (folder / "run" / "results.json").unlink()
    path, *later = list_checkpoints(folder / "run" / "checkpoints")
    for each in later:
        each.unlink()
    return config, path


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> tuple[Any, Path]:
    """A pre-training with a checkpoint, and its config."""
    return stopped_run(tmp_path_factory.mktemp("pretrain"), "pretrain")


def reseal(path: Path, content: dict[str, Any]) -> None:
    """Write a content into a checkpoint's file, with a checksum that fits."""
    torch.save(content, path)
    seal_archive(path)


def refuse_all(train: Callable[[Any], Any], stopped: tuple[Any, Path], cases: list[Case]) -> None:
    """Check that a run refuses to resume from each changed content, and changes no file."""
    config, path = stopped
    good, whole = load_checkpoint(path), path.read_bytes()
    for number, (change, item) in enumerate(cases):
        content = copy.deepcopy(good)
        change(content)
        reseal(path, content)
        with pytest.raises(UserError, match=item) as refused:
            train(config)
        said = str(refused.value)
        assert path.name in said or str(config.output.dir) in said, (number, said)
        assert "\n" not in said
        assert not (config.output.dir / "results.json").exists()
        assert list_checkpoints(path.parent) == [path]
    path.write_bytes(whole)
    print(f"\n{len(cases)} contents refused")


def test_content_that_cannot_be_right_is_refused_with_its_file_and_item(stopped) -> None:
    refuse_all(pretrain, stopped, (COMMON + PRETRAINING)[::4])


@pytest.mark.slow
def test_each_content_that_cannot_be_right_is_refused(stopped) -> None:
    refuse_all(pretrain, stopped, COMMON + PRETRAINING)


@pytest.mark.slow
def test_content_of_a_classifier_that_cannot_be_right_is_refused(tmp_path) -> None:
    refuse_all(classify, stopped_run(tmp_path, "classifier"), COMMON + CLASSIFIER)


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
