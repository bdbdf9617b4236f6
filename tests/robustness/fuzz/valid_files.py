"""Valid files as their writers leave them, which readers are given changed copies of."""

import io
import json
import struct
import tarfile
import zipfile
from functools import cache
from typing import Any

import numpy as np
import torch
from image_files import npy
from safetensors.torch import save as safetensors_bytes

from mae_et.config.files import config_from_text, to_yaml
from mae_et.config.schema import PretrainConfig
from mae_et.io.seals import seal, sealed_bytes
from mae_et.models.mae import MaskedAutoencoder

MODEL = {
    "encoder": "vit_tiny_patch16_224", "image_size": 16, "patch_size": 8, "encoder_embed_dim": 8,
    "encoder_depth": 1, "encoder_num_heads": 1, "decoder_embed_dim": 8, "decoder_depth": 1,
    "decoder_num_heads": 1,
}  # fmt: skip


RUN = f"model: {json.dumps(MODEL)}\n"


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
        "00000.npy": sealed_bytes(npy(rows)),
        "00000-original.tar": content,
        "00000-8.tar": content,
    }


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


def numpy_archive() -> bytes:
    """Return an archive of NumPy's, which is refused by what it is."""
    file = io.BytesIO()
    np.savez(file, kernel=np.zeros(2))
    return file.getvalue()
