"""Runs that start from the weights of another model, in any layout."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import built
import pytest
import timm
import torch
from ranks import run as run_on_ranks
from safetensors.torch import save_file
from tiny_run import GOLDEN, config_in

from mae_et import MaskedAutoencoder, UserError, export, load_pretrained, pretrain
from mae_et.checkpoints import formats
from mae_et.checkpoints.store import list_checkpoints, newest_checkpoint
from mae_et.cli.commands import config_of
from mae_et.config.files import to_yaml
from mae_et.config.init import InitConfig
from mae_et.config.schema import PretrainConfig
from mae_et.data.batch import Batch
from mae_et.data.datasets import open_dataset
from mae_et.data.train_dataset import TrainDataset
from mae_et.data.transforms import normalise
from mae_et.io.metrics_file import read_metrics
from mae_et.models.masking import mask_from_noise
from mae_et.models.pos_embed import sincos_positions
from mae_et.pretraining import Pretraining
from mae_et.runtime import distributed
from mae_et.training.run import Run

RELEASED = GOLDEN / "mae_tiny_released_format.pth"
CPU = torch.device("cpu")
HEADS = {"encoder_num_heads": 3, "decoder_num_heads": 4}
SAME_MODEL = """
model: {encoder: vit_tiny_patch16_224, image_size: 64, patch_size: 8, encoder_embed_dim: 48,
        encoder_depth: 3, encoder_num_heads: 3, decoder_embed_dim: 32, decoder_depth: 2,
        decoder_num_heads: 4}
data: {synthetic_size: 64, synthetic_train: 20, synthetic_val: 20}
curriculum: {preset: constant, epochs: 2.4}
optim: {batch_size: 8, base_lr: 0.02}
efficiency: {num_workers: 0, device: cpu}
output: {log_every: 1, checkpoint_every: 2, reconstruct_images: 0, tensorboard: false}
"""


@pytest.fixture(scope="module")
def parsed(tmp_path_factory) -> PretrainConfig:
    """Config of the golden weights' model."""
    return config_in(tmp_path_factory.mktemp("recipe"), recipe=SAME_MODEL)


@pytest.fixture(scope="module")
def recipe(parsed: PretrainConfig) -> Path:
    """Path of that config."""
    return parsed.output.dir.with_name("recipe.yaml")


@pytest.fixture
def starting(parsed: PretrainConfig, tmp_path: Path):
    """A function that builds the config of a run that starts from weights."""

    def build(weights: Path | str, decoder: str = "auto", **model: object) -> PretrainConfig:
        return replace(
            parsed,
            model=replace(parsed.model, **model),
            init=InitConfig(Path(weights), decoder),
            output=replace(parsed.output, dir=tmp_path / "run"),
        )

    return build


@pytest.fixture(scope="module")
def layouts(parsed: PretrainConfig, tmp_path_factory) -> dict[str, Path]:
    """The golden weights in every layout that is read."""
    folder = tmp_path_factory.mktemp("layouts")
    tensors = torch.load(RELEASED, weights_only=True)["model"]
    encoder = {n: t for n, t in tensors.items() if "decoder" not in n and n != "mask_token"}
    torch.save({"model": encoder}, folder / "encoder_only.pth")
    save_file(encoder, folder / "timm.safetensors")
    export(RELEASED, "hf", folder / "hf", **HEADS)
    pretrain(
        replace(
            parsed,
            init=InitConfig(RELEASED),
            data=replace(parsed.data, mean=(0.3,), std=(0.2,)),
            output=replace(parsed.output, dir=folder / "run"),
        )
    )
    return {
        "released": RELEASED,
        "training": GOLDEN / "mae_tiny_training_format.pth",
        "encoder_only": folder / "encoder_only.pth",
        "timm": folder / "timm.safetensors",
        "hugging_face": folder / "hf",
        "our_run": folder / "run",
        "our_checkpoint": list_checkpoints(folder / "run" / "checkpoints")[-1],
        "our_encoder": folder / "run" / "encoder.safetensors",
    }


def build(config: PretrainConfig) -> tuple[Run, Any]:
    run = built.build(Pretraining(config), distributed.initialize("cpu"), 20)
    return run, run.state.model


def first_batch(run: Run) -> Batch:
    config = run.config
    source = open_dataset(config.data, "train", config.model.channels)
    dataset = TrainDataset(
        source, config.data, run.plan, config.model.patch, config.seed, config.crop.method
    )
    samples = [dataset[index] for index in next(iter(run.sampler()))]
    return Batch(*(torch.stack([sample[part] for sample in samples]) for part in range(3)))


@pytest.mark.parametrize(
    "layout",
    ["released", "training", "encoder_only", "timm", "hugging_face", "our_run", "our_checkpoint",
     "our_encoder"],
)  # fmt: skip
def test_a_run_starts_as_the_model_of_its_initial_weights(
    layouts: dict[str, Path], layout: str, starting, capsys
) -> None:
    """The loss of step 0 is the loaded model's own, on the same images and masks, bit for bit."""
    path = layouts[layout]
    config = starting(path)
    run, model = build(config)
    said = capsys.readouterr().err
    loaded = load_pretrained(path, **HEADS)
    batch = first_batch(run)
    images = normalise(batch.images, config.data.mean, config.data.std)
    assert torch.equal(model.encode(images), loaded.encode(images))
    if loaded.decoder is None:
        assert "encoder taken, decoder fresh (the weights have none)" in said
    else:
        expected = loaded(images, mask_from_noise(batch.noise, config.model.mask_ratio)).loss
        assert torch.equal(Pretraining(config).loss(run, run.plan.stages[0], batch), expected)
        assert "encoder and decoder taken" in said
    assert len(said.splitlines()) == 1


def test_statistics_of_the_weights_are_inherited_unless_given(
    layouts: dict[str, Path], recipe: Path, tmp_path: Path, capsys
) -> None:
    flags = [f"--config={recipe}", f"--output.dir={tmp_path}", f"--init={layouts['our_run']}"]
    config = config_of("pretrain", flags)
    assert config.data.mean == (0.3,)
    assert config.data.std == (0.2,)
    build(config)
    assert "mean and std as for the weights" in capsys.readouterr().err
    given = config_of("pretrain", [*flags, "--data.mean=[0.7]", "--data.std=[0.2]"])
    assert given.data.mean == (0.7,)
    build(given)
    assert "but data.mean [0.7] (the checkpoint has [0.3])" in capsys.readouterr().err


def test_another_epsilon_is_reported(starting, layouts: dict[str, Path], tmp_path, capsys) -> None:
    shutil.copytree(layouts["hugging_face"], tmp_path / "hf")
    about = json.loads((tmp_path / "hf" / "config.json").read_text()) | {"layer_norm_eps": 1e-12}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(about))
    build(starting(tmp_path / "hf"))
    assert "layer norms of epsilon 1e-06, not 1e-12" in capsys.readouterr().err


def test_learned_positions_are_replaced_and_reported(starting, monkeypatch, capsys) -> None:
    """The class token keeps its position, which is added to it; other weights stay the same."""
    vit = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=64, patch_size=8, embed_dim=48, depth=3,
        num_heads=3,
    )  # fmt: skip
    torch.nn.init.normal_(vit.pos_embed)
    monkeypatch.setattr(formats, "fetch_from_hub", lambda name, num_classes: vit)
    _, model = build(starting("vit_tiny_patch16_224.augreg_in21k"))
    assert "learned positions replaced by the fixed sine-cosine table" in capsys.readouterr().err
    torch.testing.assert_close(model.encoder.cls_token, vit.cls_token + vit.pos_embed[:, :1])
    assert torch.equal(model.encoder.blocks[2].mlp.fc1.weight, vit.blocks[2].mlp.fc1.weight)
    assert torch.equal(model.encoder.pos_embed[0, 1:], sincos_positions((8, 8), (8, 8), 48, CPU))


def test_another_base_size_lays_positions_over_the_grid_of_the_weights(
    starting, recipe: Path, tmp_path: Path, capsys
) -> None:
    """So an image is encoded as the loaded model encodes it at that bandwidth, bit for bit."""
    flags = [f"--config={recipe}", f"--output.dir={tmp_path / 'small'}", f"--init={RELEASED}"]
    config = config_of("pretrain", [*flags, "--model.image_size=32", "--data.synthetic_size=32"])
    assert config.model.position_grid == 8
    _, model = build(config)
    assert "positions of 4x4 patches, laid over the 8x8 of the weights" in capsys.readouterr().err
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(model.encode(images), load_pretrained(RELEASED, **HEADS).encode(images))
    assert torch.allclose(model.encoder.forward_features(images), model.encode(images), atol=1e-5)
    encoder = pretrain(config) / "encoder.safetensors"
    loaded = load_pretrained(encoder)
    assert loaded.position_grid == (8, 8)
    reread = load_pretrained(export(encoder, "hf", tmp_path / "hf"))  # records no grid
    assert torch.equal(reread.encode(images), loaded.encode(images))
    assert config_of("pretrain", flags[:2]).model.position_grid is None
    build(starting(RELEASED, image_size=32))  # in Python, unless the config says so
    assert "4x4 patches, not laid over the 8x8 of the weights" in capsys.readouterr().err


def test_another_patch_resamples_the_patch_embedding(starting, capsys) -> None:
    """An image of one colour has the same embedding at any patch size."""
    (_, model), (_, other) = build(starting(RELEASED)), build(starting(RELEASED, patch_size=16))
    said = capsys.readouterr().err
    assert "patch embedding resampled from 8 to 16 pixels" in said
    assert "decoder fresh (it does not fit: 2 misshapen (pred.weight" in said
    sums = [m.encoder.patch_embed.proj.weight.sum(dim=(2, 3)) for m in (model, other)]
    torch.testing.assert_close(*sums, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"decoder": "fresh"}, "init.decoder fresh"),
        ({"target": "pixel"}, "model.target is pixel, not norm_pix"),
        ({"decoder_num_heads": 2}, "model.decoder_num_heads is 2, not 4"),
    ],
)
def test_a_decoder_that_does_not_fit_is_fresh(
    layouts: dict[str, Path], starting, capsys, settings: dict[str, object], reason: str
) -> None:
    run, model = build(starting(layouts["our_run"], **settings))
    assert f"decoder fresh ({reason})" in capsys.readouterr().err
    torch.manual_seed(run.config.seed)
    untrained = MaskedAutoencoder.from_config(run.config.model)
    assert torch.equal(model.decoder.embed.weight, untrained.decoder.embed.weight)
    assert not torch.equal(model.encoder.norm.weight, untrained.encoder.norm.weight)


def test_weights_of_another_architecture_are_refused(
    layouts: dict[str, Path], starting, tmp_path: Path
) -> None:
    wide = "has an encoder of width 48, depth 3, 3 heads and 3 channels, but model.encoder "
    wide += "vit_tiny_patch16_224 has width 96, depth 3, 3 heads and 3 channels: set"
    tensors = torch.load(RELEASED, weights_only=True)["model"]
    torch.save(tensors | {"blocks.0.ls1.gamma": torch.ones(48)}, tmp_path / "scaled.pth")
    for path, settings, sentence in (
        (RELEASED, {"encoder_embed_dim": 96}, wide),
        (layouts["our_run"], {"encoder_num_heads": 6}, "3 heads .*, but .* 6 heads"),
        (tmp_path / "scaled.pth", {}, r"unexpected \(blocks\.0\.ls1\.gamma\)"),
        (tmp_path / "missing.pth", {}, "there is no checkpoint"),
    ):
        with pytest.raises(UserError, match=sentence) as caught:
            build(starting(path, **settings))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"init\.decoder and init\.checkpoint_key need init\.wei"):
        InitConfig(decoder="fresh")


def test_a_run_resumes_without_its_initial_weights(
    starting, recipe: Path, tmp_path: Path, capsys
) -> None:
    """Bit for bit; checkpoints record the hash of the weights, and the config must be the same."""
    weights = tmp_path / "weights.pth"
    shutil.copy(RELEASED, weights)
    config = starting(weights)
    pretrain(config, stop_after_step=3)
    weights.unlink()
    flags = [f"--config={recipe}", f"--output.dir={config.output.dir}", f"--init={weights}"]
    assert config_of("pretrain", flags) == config  # the statistics are those of the run folder
    with pytest.raises(UserError, match=r"init\.weights was .*weights\.pth' and is now .*released"):
        pretrain(starting(RELEASED))
    capsys.readouterr()
    pretrain(config)
    assert "starting from" not in capsys.readouterr().err
    whole = pretrain(replace(starting(RELEASED), output=replace(config.output, dir=tmp_path / "w")))
    ends = [newest_checkpoint(folder / "checkpoints") for folder in (whole, config.output.dir)]
    for name, weight in ends[0]["model"].items():
        assert torch.equal(ends[1]["model"][name], weight), name
    assert ends[0]["origin"] == ends[1]["origin"]
    assert len(ends[0]["origin"]["init"]) == 64
    rows = [[row["loss"] for row in read_metrics(f)] for f in (whole, config.output.dir)]
    assert rows[0] == rows[1]


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_ranks_start_from_the_same_weights(tmp_path: Path, sharding: str) -> None:
    config = config_in(tmp_path, f"--init.weights={RELEASED}", recipe=SAME_MODEL)
    for ranks in (1, 2):
        done = run_on_ranks(
            tmp_path, ranks, f"--efficiency.sharding={sharding}", "--efficiency.micro_batch=4",
            yaml=to_yaml(config),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("mae-et: starting from") == 1
    one, two = ([row["loss"] for row in read_metrics(tmp_path / str(ranks))] for ranks in (1, 2))
    assert two == pytest.approx(one, rel=1e-4)
