"""The readers: what each is given, from what valid files, and what alone it may raise.

The first byte of an input chooses the part of a data set, a run or an archive that the rest of it
is; the other parts stay as a writer left them.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from classifiers import vit_of
from image_files import npy
from jsonargparse import ArgumentParser
from sealing import seal_archive

from finetune.config import ClassifierConfig
from finetune.probing.feature_cache import read_features, write_features
from finetune.run_folder import read_classifier_config
from fuzz.valid_files import (
    RUN,
    classifier,
    encoder,
    header_of,
    hugging_face,
    mae_file,
    numpy_archive,
    pickle_of,
    prepared,
    run_checkpoint,
    run_folder,
    shard,
    with_header,
    with_pickle,
)
from mae_et.checkpoints.formats import load_weights
from mae_et.checkpoints.load import masked_autoencoder
from mae_et.checkpoints.run_config import read_only_data
from mae_et.checkpoints.store import load_checkpoint
from mae_et.config.commands import CompareConfig
from mae_et.config.data import DataConfig
from mae_et.config.files import add_config_arguments, config_from_text, parse_config, to_yaml
from mae_et.config.schema import PretrainConfig
from mae_et.curriculum.speeds import read_speeds
from mae_et.data.datasets import open_dataset
from mae_et.data.layout import EXTENSIONS
from mae_et.data.sources.webdataset import TarShards
from mae_et.errors import RunFailed, UserError
from mae_et.io.seals import sealed_bytes
from mae_et.monitoring.compare import compare
from slurm import squeue
from slurm.config import ClusterConfig
from slurm.run_status import status
from slurm.status_table import table

WIDEST = 64  # networks wider than that are not built here: it would take memory, and show nothing


@dataclass(frozen=True)
class Target:
    """A reader."""

    seeds: Callable[[], list[bytes]]
    """Returns what its writers leave."""
    read: Callable[[bytes, Path], None]
    """Reads an input by way of files in a folder; raises nothing that the reader may raise."""


def parts(files: dict[str, bytes]) -> list[bytes]:
    return [bytes([place]) + content for place, content in enumerate(files.values())]


def lay_out(files: dict[str, bytes], data: bytes, folder: Path) -> None:
    """Write files, one of them an input's."""
    place = data[0] % len(files) if data else 0
    for number, (name, content) in enumerate(files.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data[1:] if number == place else content)


def build(path: Path) -> None:
    """Read weights, and build the networks around them, as far as they are small."""
    with suppress(UserError):
        found = load_weights(path)
        sizes = [side for tensor in found.encoder.values() for side in tensor.shape]
        if found.model is not None:
            about = found.model
            sizes += [about.encoder_embed_dim or 192, about.image_size, about.decoder_embed_dim,
                      about.encoder_depth or 12, about.decoder_depth, about.channels]  # fmt: skip
        sizes += [found.encoder_num_heads or 1, found.decoder_num_heads or 1]
        if all(isinstance(side, int) and side <= WIDEST for side in sizes):
            with suppress(UserError):
                masked_autoencoder(found.with_given(1, 1))
            with suppress(UserError):
                vit_of(found.with_given(1), 2, 16)
        if found.config is not None:
            assert read_only_data(found.config.data).listing is None


def read_checkpoint(data: bytes, folder: Path) -> None:
    content = data[1:]
    if data[:1] == b"\1":
        content = with_pickle(run_checkpoint(), content)
    path = folder / "step-00000001.pt"
    path.write_bytes(content)
    with suppress(ValueError, OSError):  # whoever changes a file can change its checksum too
        seal_archive(path)
    try:
        load_checkpoint(path)
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017


def read_weights(data: bytes, folder: Path) -> None:
    kind, content = data[:1], data[1:]
    if kind in {b"\1", b"\2"}:
        content = with_pickle(run_checkpoint() if kind == b"\1" else mae_file(), content)
    elif kind == b"\3":
        content = with_header(encoder(), content)
    (folder / "file.pth").write_bytes(content)
    build(folder / "file.pth")


def read_hugging_face(data: bytes, folder: Path) -> None:
    lay_out(hugging_face(), data, folder)
    build(folder)


def read_classifier(data: bytes, folder: Path) -> None:
    lay_out(classifier(), data, folder)
    build(folder)
    with suppress(UserError):
        read_classifier_config(folder)


@contextmanager
def refused_in_one_line() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017


def read_config(data: bytes, folder: Path) -> None:
    text = data[1:].decode("utf-8", errors="replace")
    kind = (PretrainConfig, ClassifierConfig, ClusterConfig)[data[0] % 3 if data else 0]
    with refused_in_one_line():
        found = config_from_text(text, kind)
        assert config_from_text(to_yaml(found), kind) == found or "nan" in text.lower()


@cache
def flags() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    add_config_arguments(parser, PretrainConfig)
    return parser


def read_flags(data: bytes, folder: Path) -> None:
    words = data.decode("utf-8", errors="replace").split("\0")
    asks = ("-h", "--help", "--print_config", "--config")  # print and exit, or read other files
    if not any(word.startswith(asks) for word in words):
        with refused_in_one_line():
            parse_config(flags(), PretrainConfig, words)


def read_shard(data: bytes, folder: Path) -> None:
    (folder / "train").mkdir(exist_ok=True)
    (folder / "train" / "0.tar").write_bytes(data)
    with suppress(UserError):
        shards = TarShards([folder / "train" / "0.tar"], EXTENSIONS)
        for index in range(min(len(shards), 4)):
            assert len(shards[index][0]) <= len(data)
    _read_images(DataConfig(name="wds", root=folder))


def read_prepared(data: bytes, folder: Path) -> None:
    lay_out(prepared(), data, folder / "train")
    _read_images(DataConfig(name="shards", root=folder))


def read_listing(data: bytes, folder: Path) -> None:
    top = folder / "data" / "train"
    (top / "a").mkdir(parents=True, exist_ok=True)
    (top / "a" / "b.png").touch()
    config = DataConfig(root=folder / "data", listing=folder / "kept")
    with suppress(UserError):
        open_dataset(config, "train")
    for kept in (folder / "kept").iterdir():
        kept.write_bytes(sealed_bytes(data))  # any content, under its checksum
    with suppress(UserError):
        source: Any = open_dataset(config, "train")
        for index in range(min(len(source), 4)):
            path = os.path.normpath(source.inner.path(index))
            assert Path(path).is_relative_to(top), path
    _read_images(config)


def _read_images(config: DataConfig) -> None:
    with suppress(UserError, RunFailed):
        source = open_dataset(config, "train")
        for index in range(min(len(source), 4)):
            with suppress(RunFailed):
                source[index]


def read_run(data: bytes, folder: Path) -> None:
    lay_out(run_folder(), data, folder)
    with patch.object(squeue, "run_program", return_value=None):  # SLURM's programs
        table(status([folder]))
    with suppress(UserError):
        compare(CompareConfig([folder]))
    with suppress(UserError):
        read_speeds(str(folder), "--throughput", float)


FLAGS = [
    b"--optim.base_lr=1e-3\0--seed\x003",
    b"--curriculum.preset=custom\0--curriculum.stages=[{bandwidth: 96, share: 1}]",
    b"--efficiency.micro_batch={96: 4}",
]


def config_seeds() -> list[bytes]:
    shipped = sorted((Path(__file__).parents[3] / "configs").glob("*/*.yaml"))[::4]
    kinds = {"pretrain": 0, "finetune": 1, "supervised": 1, "cluster": 2}
    written = [bytes([kinds[path.parent.name]]) + path.read_bytes() for path in shipped]
    return [*written, b"\0" + RUN.encode(), b"\2extra: {a: {class_path: evil_module.Thing}}"]


def weight_seeds() -> list[bytes]:
    return [
        b"\0" + run_checkpoint(), b"\0" + mae_file(), b"\0" + encoder(),
        b"\1" + pickle_of(run_checkpoint()), b"\2" + pickle_of(mae_file()),
        b"\3" + header_of(encoder()), b"\0" + numpy_archive(),
    ]  # fmt: skip


def read_kept_features(data: bytes, folder: Path) -> None:
    (folder / "kept.safetensors").write_bytes(data)
    found = read_features(folder / "kept.safetensors")
    assert found is None or torch.equal(found["vectors"], torch.ones(3, 2))


def kept_features() -> bytes:
    with TemporaryDirectory() as folder:
        write_features(Path(folder, "kept"), torch.ones(3, 2), torch.arange(3))
        return Path(folder, "kept").read_bytes()


TARGETS = {
    "features": Target(lambda: [kept_features()], read_kept_features),
    "checkpoint": Target(
        lambda: [b"\0" + run_checkpoint(), b"\1" + pickle_of(run_checkpoint())], read_checkpoint
    ),
    "weights": Target(weight_seeds, read_weights),
    "hugging_face": Target(lambda: parts(hugging_face()), read_hugging_face),
    "classifier": Target(lambda: parts(classifier()), read_classifier),
    "config": Target(config_seeds, read_config),
    "flags": Target(lambda: FLAGS, read_flags),
    "shard": Target(lambda: [shard()], read_shard),
    "prepared": Target(lambda: parts(prepared()), read_prepared),
    "listing": Target(lambda: [npy(np.array([b"a/b.png", b"../x.png"]))], read_listing),
    "run": Target(lambda: parts(run_folder()), read_run),
}
