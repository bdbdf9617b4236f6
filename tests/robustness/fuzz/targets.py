"""The readers: what each is given, from what valid files, and what alone it may raise.

The first byte of an input chooses the part of a data set, a run or an archive that the rest of it
is; the other parts stay as a writer left them.
"""

import io
import json
import os
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from classifiers import vit_of
from jsonargparse import ArgumentParser
from safetensors.torch import save as safetensors_bytes
from sealing import seal_archive

from finetune.config import ClassifierConfig
from finetune.run_folder import read_classifier_config
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
from mae_et.io.seals import seal, sealed_bytes
from mae_et.models.mae import MaskedAutoencoder
from mae_et.monitoring.compare import compare
from slurm import squeue
from slurm.config import ClusterConfig
from slurm.run_status import status
from slurm.status_table import table

MODEL = {
    "encoder": "vit_tiny_patch16_224", "image_size": 16, "patch_size": 8, "encoder_embed_dim": 8,
    "encoder_depth": 1, "encoder_num_heads": 1, "decoder_embed_dim": 8, "decoder_depth": 1,
    "decoder_num_heads": 1,
}  # fmt: skip
RUN = f"model: {json.dumps(MODEL)}\n"
WIDEST = 64  # networks wider than that are not built here: it would take memory, and show nothing


@dataclass(frozen=True)
class Target:
    """A reader."""

    seeds: Callable[[], list[bytes]]
    """Returns what its writers leave."""
    read: Callable[[bytes, Path], None]
    """Reads an input by way of files in a folder; raises nothing that the reader may raise."""


# --- what writers leave ---------------------------------------------------------------------------


@cache
def network() -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder.from_config(config_from_text(RUN, PretrainConfig).model)


def saved(payload: Any) -> bytes:
    file = io.BytesIO()
    torch.save(payload, file)
    return file.getvalue()


@cache
def run_checkpoint() -> bytes:
    weights = network().state_dict()
    state = {
        "step": 1,
        "seconds": 0.5,
        "model": weights,
        "optimizer": {"state": {}, "param_groups": []},
        "scaler": {},
    }
    about = {"config": to_yaml(config_from_text(RUN, PretrainConfig)), "plan": {"stages": []}}
    return saved({"format": "mae-et/1", **about, **state})


@cache
def encoder() -> bytes:
    weights = {name: value.contiguous() for name, value in network().encoder.state_dict().items()}
    return safetensors_bytes(weights, {"mae_et.model": json.dumps(MODEL)})


@cache
def mae_file() -> bytes:
    weights = dict(network().encoder.state_dict())
    return saved({"model": weights, "epoch": 3})


def seal_if_archive(path: Path) -> None:
    """Give a torch archive its checksum, without which none is read as a run's checkpoint."""
    with suppress(ValueError, OSError):
        seal_archive(path)


def pickle_of(content: bytes) -> bytes:
    """Return the pickle inside of torch's archive."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def with_pickle(content: bytes, pickled: bytes) -> bytes:
    """Put another pickle into torch's archive, with the checksum that it should have."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            new.writestr(name, pickled if name.endswith("data.pkl") else old.read(name))
    return file.getvalue()


def header_of(content: bytes) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    return content[8 : 8 + length]


def with_header(content: bytes, header: bytes) -> bytes:
    """Put another header into a safetensors file, with the length that it should have."""
    (length,) = struct.unpack("<Q", content[:8])
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


@cache
def shard() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in (("a.png", b"\x89PNG"), ("a.cls", b"1"), ("b/c.jpg", b"jpg")):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


@cache
def prepared() -> dict[str, bytes]:
    from mae_et.data.sources.prepared_shards import VERSION, index_dtype

    content = b"not an image, which raises an error"
    rows = np.zeros(2, index_dtype(1))
    rows["size"][:, 1], rows["height"], rows["width"], rows["label"] = len(content), 8, 8, [0, 1]
    about = {"version": VERSION, "images": 2, "shards": 1, "levels": [8], "classes": ["a", "b"]}
    return {
        "split.json": json.dumps(seal(about)).encode(),
        "00000.npy": sealed_bytes(array(rows)),
        "00000-original.tar": content,
        "00000-8.tar": content,
    }


def array(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


@cache
def run_folder() -> dict[str, bytes]:
    row = {
        "step": 2, "stage": 0, "bandwidth": 8, "loss": 1.5, "time": 1.0, "seconds": 2.0,
        "compute": 0.5, "images_per_second": 10.0, "window_seconds": 1.0,
    }  # fmt: skip
    events = [
        {"time": 1.0, "event": "submitted", "job": "7", "restart": 0, "executor": "local",
         "logs": "/etc"},
        {"time": 2.0, "event": "started", "job": "7", "restart": 0, "step": 0, "lost": 0},
        {"time": 3.0, "event": "failed", "job": "7", "restart": 0, "sentence": "no", "kind": "X"},
    ]  # fmt: skip
    stages = [{"bandwidth": 8, "images": 10, "images_per_second": 5.0}]
    return {
        "metrics.jsonl": f"{json.dumps(row)}\n".encode() * 2,
        "slurm/events.jsonl": "".join(f"{json.dumps(event)}\n" for event in events).encode(),
        "plan.json": b'{"stages": [{"steps": 4}]}',
        "results.json": json.dumps({"loss": 1.0, "stages": stages}).encode(),
        "config.yaml": RUN.encode(),
        "knn/results.json": b'{"data": "a", "knn": 5.0, "provenance": {"weights": "x"}}',
        "knn/results-1.json": b'{"data": "a", "settings": "pool=cls", "knn": 5.0}',
        "finetune/results.json": b'{"top1": 5.0, "loss": 1.0, "images": 10}',
    }


@cache
def hugging_face() -> dict[str, bytes]:
    from mae_et.checkpoints.writers.hugging_face import vit_mae

    tensors, about = vit_mae(network())
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    index = {"weight_map": dict.fromkeys(tensors, "part.safetensors")}
    return {
        "config.json": json.dumps(about).encode(),
        "model.safetensors.index.json": json.dumps(index).encode(),
        "part.safetensors": safetensors_bytes(tensors),
    }


@cache
def classifier() -> dict[str, bytes]:
    settings = "model: {checkpoint: nowhere.pth, image_size: 16}\ndata: {name: synthetic}\n"
    about = {"classes": ["a", "b"], "encoder_num_heads": 1, "grid": [2, 2]}
    return {
        "classes.json": json.dumps(seal(about)).encode(),
        "config.yaml": settings.encode(),
        "model.safetensors": encoder(),
    }


# --- reading --------------------------------------------------------------------------------------


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
    seal_if_archive(path)  # whoever changes a file can change its checksum too
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


def arrays() -> bytes:
    """Return an archive of NumPy's, which is refused by what it is."""
    file = io.BytesIO()
    np.savez(file, kernel=np.zeros(2))
    return file.getvalue()


def weight_seeds() -> list[bytes]:
    return [
        b"\0" + run_checkpoint(), b"\0" + mae_file(), b"\0" + encoder(),
        b"\1" + pickle_of(run_checkpoint()), b"\2" + pickle_of(mae_file()),
        b"\3" + header_of(encoder()), b"\0" + arrays(),
    ]  # fmt: skip


TARGETS = {
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
    "listing": Target(lambda: [array(np.array([b"a/b.png", b"../x.png"]))], read_listing),
    "run": Target(lambda: parts(run_folder()), read_run),
}
