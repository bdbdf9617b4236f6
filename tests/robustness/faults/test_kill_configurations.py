"""Runs of many configurations, killed a hundred times, equal uninterrupted ones bit for bit."""

import random
import re
import signal
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import CLASSIFIER, QUIET, same_weights
from natural_images import jpeg, natural
from test_kills import PLACES, Strike, attempt
from tiny_run import TINY

from finetune import ClassifierConfig, classify
from mae_et import DataConfig, PretrainConfig, UserError, load_config, pretrain
from mae_et.checkpoints.store import newest_checkpoint
from mae_et.config.commands import PrepareConfig
from mae_et.data.device.choose_decoder import decode_torchvision
from mae_et.data.device.decode_ahead import DeviceDecoder
from mae_et.data.prepare import prepare
from mae_et.io.metrics_file import METRICS, SCORES, read_metrics
from mae_et.training import session

KILLS = 9  # per configuration, but where each start compiles for long; 101 in all
KILLS_COMPILED = 2
SEED = 11

FOLDER = "--data.name=folder --data.root=FOLDER"
LABELLED = "--data.name=folder --data.root=LABELLED"
SHARDS = "--data.name=shards --data.root=SHARDS"
SYNTHETIC = "--data.name=synthetic --data.root=null"
# One of each line is drawn for every configuration; "" keeps the default.
OPTIONS = [
    ["", "--model.target=pixel", "--model.target=hog"],
    ["", "--model.decoder_attention=cross"],
    ["", "--model.decoder_share=0.5"],
    ["", "--crop.method=resize", "--crop.method=decode"],
    ["", "--optim.clip_grad=0.5"],
    ["", "--optim.max_skipped_updates=2"],
    ["", "--optim.decay_fraction=0.2"],
    ["", "--optim.weight_decay_end=0.2"],
    ["", "--efficiency.precision=bf16"],
    ["", "--efficiency.micro_batch=4", "--efficiency.micro_batch=auto"],
    ["", "--efficiency.gradient_checkpointing=true"],
    ["--efficiency.num_workers=0", "--efficiency.num_workers=1"],
    [FOLDER, SHARDS, SYNTHETIC],
    ["", "--data.augment=rand-m5-mstd0.5"],
    ["", "--data.cache=ram"],
    ["", "--output.keep_every=4"],
]
# Each of these is in one configuration, whatever is drawn.
FORCED = [
    ["--efficiency.compile=true", "--curriculum.preset=constant", "--curriculum.stages=[]",
     "--efficiency.micro_batch=null", "--crop.method=resize",
     "--model.target=norm_pix", "--efficiency.gradient_checkpointing=false"],
    ["--init.weights=START", "--model.decoder_attention=self"],
    ["--probe.every=4", LABELLED, "--data.augment=null"],
    [FOLDER, "--data.augment=null", "--data.cache=none"],  # the twin of GPU decoding
    ["--data.replay={16: 2}", SYNTHETIC],
    ["--curriculum.cost=area", "--curriculum.shares_of=images"],
]  # fmt: skip
COMPILED, TWIN = 0, 3
RESNET = "--model={backbone: resnet10t, image_size: 32} --curriculum.preset=constant"
CLASSIFIER_OPTIONS = [
    ["--model={backbone: test_vit, image_size: 32}", f"{RESNET} --curriculum.stages=[]"],
    ["", "--recipe.mixup=0.8", "--recipe.cutmix=1.0"],
    ["--optim.optimizer=lars", "--optim.optimizer=lamb", ""],
    ["", "--efficiency.micro_batch=4"],
    ["", "--optim.clip_grad=1"],
    ["", "--efficiency.precision=bf16"],
    [LABELLED, SHARDS, SYNTHETIC],
    ["--output.tensorboard=true"],
]
PRETRAININGS, CLASSIFIERS = 10, 2


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """Folders of JPEGs without and with classes, prepared shards, and a run to start from."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("data")
    for split, count in (("train", 40), ("val", 20)):
        for number in range(count):
            content = jpeg(natural(48, 40 + number % 9, number))
            for folder in (root / "flat" / split, root / "labelled" / split / f"c{number % 2}"):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{number:02d}.jpg").write_bytes(content)
    prepare(PrepareConfig(root / "shards", DataConfig(root=root / "labelled"), levels=(40,)))
    (root / "start.yaml").write_text(TINY)
    flags = [f"--output.dir={root / 'start'}", "--curriculum.epochs=1", *QUIET]
    pretrain(load_config(PretrainConfig, [root / "start.yaml"], flags))
    return {
        "FOLDER": root / "flat", "SHARDS": root / "shards", "LABELLED": root / "labelled",
        "START": root / "start",
    }  # fmt: skip


def drawn(number: int, chance: random.Random) -> list[str]:
    """Return the flags of a configuration; forced ones come last and win."""
    flags = [flag for line in OPTIONS if (flag := chance.choice(line))]
    return flags + (FORCED[number] if number < len(FORCED) else [])


def draw_config(
    number: int, folder: Path, places: dict[str, Path]
) -> tuple[Callable[[str], Any], list[str]]:
    """Return a function from a run's name to its config, and its flags (drawn until possible)."""
    chance = random.Random(1000 * SEED + number)
    classifier = number >= PRETRAININGS
    path = folder / "c.yaml"
    path.write_text(CLASSIFIER if classifier else TINY)
    while True:
        if classifier:
            flags = [flag for line in CLASSIFIER_OPTIONS if (flag := chance.choice(line))]
        else:
            flags = drawn(number, chance)
        flags = [word for flag in flags for word in re.split(r" (?=--)", flag)]
        for name, place in places.items():
            flags = [flag.replace(f"={name}", f"={place}") for flag in flags]

        def config(name: str, flags: list[str] = flags) -> Any:
            kind: Any = ClassifierConfig if classifier else PretrainConfig
            shared = [f"--curriculum.epochs={6 if classifier else 8}", f"--seed={number}"]
            where = [f"--output.dir={folder / name}", "--output.checkpoint_every=2"]
            return load_config(kind, [path], [*flags, *shared, *where])

        try:
            config("any")
        except UserError:
            continue
        return config, flags


def use_the_twin(_: Any, dataset: Any, *__: Any) -> DeviceDecoder:
    return DeviceDecoder(torch.device("cpu"), dataset.sides, decode_torchvision)


@pytest.mark.faults
@pytest.mark.parametrize("number", range(PRETRAININGS + CLASSIFIERS))
def test_killed_run_of_any_configuration_equals_an_uninterrupted_one(
    tmp_path: Path, places: dict[str, Path], monkeypatch, number: int
) -> None:
    """Bit for bit: weights, optimizer, what is exported, the loss of each row, scores."""
    torch.set_num_threads(1)
    if number == TWIN:
        monkeypatch.setattr(session, "choose_decoder", use_the_twin)
    config, flags = draw_config(number, tmp_path, places)
    print(f"\nconfiguration {number}: {' '.join(flags)}")
    classifier = number >= PRETRAININGS
    train: Any = classify if classifier else pretrain
    train(config("clean"))
    clean, killed = tmp_path / "clean", tmp_path / "killed"
    steps = read_metrics(clean)[-1]["step"]
    chance, kills = random.Random(number), Counter()
    due = KILLS_COMPILED if number == COMPILED else KILLS
    for attempted in range(due):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing that is in place is damaged
            saved = newest_checkpoint(killed / "checkpoints")
        step = saved["step"] if saved else 0
        place = PLACES[(number + attempted) % len(PLACES)]
        if place == "at_the_start" and (classifier or not saved):  # nothing is rewritten there
            place = "in_a_step"
        target = max(step + 1, steps * (attempted + 1) // (due + 1))
        strike = Strike(min(target, steps - 1), chance, steps - 1)
        code = attempt(config("killed"), strike, place, train)
        assert code == -signal.SIGKILL, (number, attempted, place, step, target, code)
        kills[place] += 1
    train(config("killed"))
    assert kills.total() == due
    assert same_weights(killed, clean)
    exported = ["best.safetensors", "model.safetensors"] if classifier else ["encoder.safetensors"]
    for name in exported:
        assert (killed / name).read_bytes() == (clean / name).read_bytes(), name
    for name, keys in ((METRICS, ("step", "loss", "grad_norm")), (SCORES, ("step", "top1", "knn"))):
        found, expected = (
            [[row.get(key) for key in keys] for row in read_metrics(folder, name)]
            for folder in (killed, clean)
        )
        assert found == expected, name
    print(f"{due} kills: {dict(kills)}")
