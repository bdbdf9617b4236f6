"""No file runs code."""

import argparse
import ast
import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from fuzz.valid_files import classifier, hugging_face, prepared, run_checkpoint
from fuzz.watch import BAIT, nothing_runs
from image_files import npy, refusal, save, write_files, write_shard
from sealing import seal_archive

from finetune.config import ClassifierConfig
from mae_et import UserError
from mae_et.checkpoints.encoders import load_encoder
from mae_et.checkpoints.formats import load_weights
from mae_et.checkpoints.source import recognise
from mae_et.checkpoints.store import newest_checkpoint
from mae_et.cli.main import main
from mae_et.config.data import DataConfig
from mae_et.config.files import config_from_text, load_config
from mae_et.config.schema import PretrainConfig
from mae_et.data.datasets import open_dataset
from mae_et.errors import RunFailed
from mae_et.io.seals import sealed_bytes
from mae_et.training import environment
from slurm.config import ClusterConfig

ROOT = Path(__file__).parents[2]
SOURCES = [path for name in ("mae_et", "finetune", "slurm", "benchmarks")
           for path in sorted((ROOT / name).rglob("*.py"))]  # fmt: skip


# --- forbidden calls in the source ----------------------------------------------------------------

# Calls that run code from a file, or write to paths from an archive.
FORBIDDEN = re.compile(
    r"(?:cloud)?pickle\.loads?|dill\.\w+|joblib\.\w+|shelve\.\w+|marshal\.\w+|os\.(?:system|popen)"
    r"|yaml\.(?:load|load_all|full_load|unsafe_load)|(?:pd|pandas)\.read_pickle|eval|exec|compile"
    r"|torch\.hub\.\w+|\w+\.extract(?:all)?|shutil\.unpack_archive"
)
REQUIRED = {"torch.load": "weights_only=True", "np.load": "allow_pickle=False"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_source_never_calls_functions_that_execute_file_content(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        said = [ast.unparse(keyword) for keyword in node.keywords]
        where = f"{path}:{node.lineno} calls {name}"
        assert not FORBIDDEN.fullmatch(name), where
        assert "shell=True" not in said, where
        assert name not in REQUIRED or REQUIRED[name] in said, f"{where} without {REQUIRED[name]}"
        if name in {"pkgutil.resolve_name", "importlib.import_module", "__import__"}:
            # A name out of a file would be imported; these are constants of the module, or what
            # the command line itself was given (search.objective).
            if path.name == "planning.py":
                continue
            assert isinstance(node.args[0], ast.Name), where
            assert node.args[0].id.isupper(), where


def test_forbidden_pattern_matches_unsafe_calls_only() -> None:
    for call in ("pickle.load", "yaml.load", "os.system", "archive.extractall", "eval"):
        assert FORBIDDEN.fullmatch(call)
    assert not FORBIDDEN.fullmatch("network.eval")


# --- a payload for every reader -------------------------------------------------------------------


class Payload:
    """Create a folder when unpickled."""

    def __reduce__(self) -> tuple:
        return (os.mkdir, (os.environ["PAYLOAD"],))


@pytest.fixture
def payload(tmp_path: Path, monkeypatch):
    """Return an object that creates a folder when unpickled, and check that it never does."""
    target = tmp_path / "ran"
    monkeypatch.setenv("PAYLOAD", str(target))
    with nothing_runs(tmp_path):
        yield Payload()
    assert not target.exists()
    pickle.loads(pickle.dumps(Payload()))
    assert target.is_dir()  # so it would have been seen


def save_objects(path: Path, payload: Payload) -> None:
    """Write a pickled array under a checksum that matches."""
    path.write_bytes(sealed_bytes(npy(np.array([payload], dtype=object))))


@pytest.mark.parametrize("name", ["file.pth", "file.safetensors", "file.bin"])
@pytest.mark.parametrize("form", ["torch", "legacy", "pickle"])
def test_pickle_in_weights_is_refused(
    payload: Payload, tmp_path: Path, name: str, form: str
) -> None:
    path = tmp_path / name
    content = {"model": {"patch_embed.proj.weight": torch.zeros(1)}, "extra": payload}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    # In plain tensors' place torch names what stands first of the pickled objects.
    refused = r"is refused: it holds (posix|torch)\..*; save its state_dict alone$"
    with pytest.raises(UserError, match=rf"{refused}|cannot be read"):
        load_weights(path)


def test_pickle_in_the_checkpoint_of_a_run_is_refused(payload: Payload, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    state = {"format": "mae-et/1", "config": "seed: 0", "optimizer": payload}
    torch.save(state, tmp_path / "checkpoints" / "step-00000001.pt")
    seal_archive(tmp_path / "checkpoints" / "step-00000001.pt")
    refusal = r"1\.pt is refused: it holds posix\.mkdir; there is no earlier one"
    with pytest.warns(UserWarning, match=refusal):
        assert newest_checkpoint(tmp_path / "checkpoints") is None


@pytest.mark.parametrize("sharded", [False, True])
def test_pickle_in_a_hugging_face_folder_is_refused(
    payload: Payload, tmp_path: Path, sharded: bool
) -> None:
    (tmp_path / "config.json").write_bytes(hugging_face()["config.json"])
    name = "part.bin" if sharded else "pytorch_model.bin"
    torch.save({"vit.embeddings.cls_token": payload}, tmp_path / name)
    index = {"weight_map": {"vit.embeddings.cls_token": name}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"is refused: it holds posix.mkdir"):
        load_weights(tmp_path)


@pytest.mark.parametrize("saved_by", ["save_for_hf", "train.py"])
def test_arguments_of_timm_name_no_other_file(
    payload: Payload, tmp_path: Path, saved_by: str
) -> None:
    torch.save({"model": payload}, tmp_path / "other.pth")
    name, arguments = "test_vit", {"checkpoint_path": str(tmp_path / "other.pth")}
    tensors = timm.create_model(name).state_dict()
    if saved_by == "train.py":
        args = argparse.Namespace(model_kwargs=arguments)
        torch.save({"arch": name, "args": args, "model": tensors}, tmp_path / "weights.pth")
    else:
        about = {"architecture": name, "model_args": arguments}
        (tmp_path / "config.json").write_text(json.dumps(about))
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    path = tmp_path / "weights.pth" if saved_by == "train.py" else tmp_path
    for read in (load_weights, load_encoder):
        with pytest.raises(UserError, match="checkpoint_path is not a setting"):
            read(path)


def test_pickle_in_a_classifier_folder_is_refused(payload: Payload, tmp_path: Path) -> None:
    write_files(tmp_path, classifier())
    torch.save({"model": payload}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"is refused: it holds posix\.mkdir|cannot be read"):
        load_weights(tmp_path)


def test_pickle_in_a_listing_is_refused(payload: Payload, tmp_path: Path) -> None:
    save(tmp_path / "data" / "train" / "a" / "b.png")
    config = DataConfig(root=tmp_path / "data", listing=tmp_path / "kept")
    open_dataset(config, "train")
    (kept,) = (tmp_path / "kept").iterdir()
    save_objects(kept, payload)
    assert f"the listing {kept} is damaged" in refusal(config)


def test_pickle_in_a_prepared_index_is_refused(payload: Payload, tmp_path: Path) -> None:
    write_files(tmp_path / "train", prepared())
    save_objects(tmp_path / "train" / "00000.npy", payload)
    assert re.search("index .* is damaged", refusal(DataConfig(name="shards", root=tmp_path)))


@pytest.mark.parametrize("name", ["x.npy", "x.png"])
@pytest.mark.parametrize("source", ["folder", "wds"])
def test_pickle_in_an_image_is_refused(
    payload: Payload, tmp_path: Path, name: str, source: str
) -> None:
    files = {name: npy(np.array([payload], dtype=object))}
    if source == "wds":
        write_shard(tmp_path / "train" / "0.tar", files)
    else:
        write_files(tmp_path / "train" / "a", files)
    opened = open_dataset(DataConfig(name=source, root=tmp_path), "train")
    with pytest.raises(RunFailed, match="cannot read the image"):
        opened[0]


def test_import_leaves_the_pixel_limit_of_pillow_unchanged() -> None:
    """Decoding raises it for good, because Pillow checks it again in every crop."""
    program = (
        "from PIL import Image; before = Image.MAX_IMAGE_PIXELS; "
        "import mae_et.data.images.decoding as ours; "
        "import io; png = io.BytesIO(); Image.new('L', (2, 2)).save(png, 'PNG'); "
        "assert Image.MAX_IMAGE_PIXELS == before; ours.decode(png.getvalue(), 1); "
        "assert Image.MAX_IMAGE_PIXELS == ours.MAX_PIXELS"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


CONFIGS = [
    "seed: !!python/object/apply:os.mkdir ['ran']",
    "seed: !!python/name:evil_module.Thing",
    "model: {class_path: evil_module.Thing}",
    "model: evil_module.Thing",
    "data: {class_path: evil_module.Thing, init_args: {root: x}}",
    "curriculum: {preset: custom, stages: [evil_module.Thing]}",
    "curriculum: {preset: custom, stages: [{class_path: evil_module.Thing}]}",
    'extra: {gres: {"cl\\x61ss_path": evil_module.Thing}}',
    "extra: {gres: {class_path: os.mkdir, init_args: {path: ran}}}",
    "model: /etc/hostname",
    "config: /etc/hostname",
]


@pytest.mark.parametrize("kind", [PretrainConfig, ClassifierConfig, ClusterConfig])
@pytest.mark.parametrize("text", CONFIGS)
def test_config_that_names_a_class_or_file_is_refused(
    payload: Payload, tmp_path: Path, text: str, kind: type
) -> None:
    with pytest.raises(UserError):
        config_from_text(text, kind)
    if kind is not (ClusterConfig if text.startswith("extra") else PretrainConfig):
        return  # making a parser takes longer than all of this
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError):
        load_config(kind, [tmp_path / "c.yaml"])
    key, _, value = text.partition(": ")
    with pytest.raises(UserError):
        load_config(kind, [], [f"--{key}={value}"])


def test_config_in_a_checkpoint_that_names_a_class_is_refused(
    payload: Payload, tmp_path: Path
) -> None:
    state = torch.load(
        write_files(tmp_path, {"c.pt": run_checkpoint()}) / "c.pt", weights_only=True
    )
    torch.save(state | {"config": CONFIGS[2]}, tmp_path / "c.pt")
    with pytest.raises(UserError, match="a config names no class"):
        load_weights(tmp_path / "c.pt")
    with pytest.raises(UserError, match="a config names no class"):
        recognise(tmp_path / "c.pt").config()


def test_nothing_runs_detects_unpickling_writes_programs_and_imports(tmp_path: Path) -> None:
    """Otherwise the tests above could not fail."""
    outside = tmp_path.with_name("outside")
    for broken in (
        lambda: pickle.loads(pickle.dumps(Path("x"))),
        outside.touch,
        lambda: os.system("true"),
        lambda: importlib.util.find_spec(f"{BAIT}.Thing"),
    ):
        with pytest.raises(AssertionError), nothing_runs(tmp_path), suppress(ImportError):
            broken()
    outside.unlink()


def test_whole_run_and_its_evaluation_unpickle_nothing(tmp_path: Path, tiny_yaml: Path) -> None:
    """Loader processes pickle samples to their own run; with none there is no pickle at all."""
    flags = [
        f"--config={tiny_yaml}",
        f"--output.dir={tmp_path / 'run'}",
        "--data.synthetic_train=24",
    ]
    knn = ["knn", f"--checkpoint={tmp_path / 'run'}", "--device=cpu", "--num_workers=0"]
    importlib.import_module("torch.distributed.elastic.multiprocessing")  # it loads libc
    environment._commit()  # asks git once per process
    with nothing_runs(tmp_path):
        assert main(["pretrain", *flags]) == 0
        assert main(["pretrain", *flags]) == 0  # reads what is there
        assert main(knn) == 0


# --- downloads ------------------------------------------------------------------------------------

HUB = "vit_tiny_patch16_224.augreg_in21k"


def test_pickle_on_the_timm_hub_is_refused(payload: Payload, tmp_path: Path, monkeypatch) -> None:
    """It lies in the cache of the hub, which cannot be reached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commit, folder = "0" * 40, tmp_path / f"models--timm--{HUB}"
    write_files(folder, {"refs/main": commit.encode(), f"snapshots/{commit}/README.md": b""})
    torch.save({"cls_token": payload}, folder / "snapshots" / commit / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"cannot fetch .* posix\.mkdir"):
        load_weights(Path(HUB))


def test_hugging_face_dataset_script_never_runs(payload: Payload, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "mine"
    write_files(folder, {"mine.py": b"import os\nos.mkdir(os.environ['PAYLOAD'])\n"})
    (folder / "train.pkl").write_bytes(pickle.dumps(payload))
    found = DataConfig(name=f"hfds/{folder}", root=tmp_path / "cache")
    assert "cannot be opened" in refusal(found)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_torchvision_dataset_with_a_wrong_checksum_is_refused(name: str, tmp_path: Path) -> None:
    folder = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]
    files = ("data_batch_1", "train", "test", "meta", "batches.meta")
    write_files(tmp_path / folder, dict.fromkeys(files, b"changed"))
    sentence = refusal(DataConfig(name=name, root=tmp_path, download=False))
    assert re.search(r"is not in .*, and data.download is off", sentence)


# --- connections ---------------------------------------------------------------------------------


def test_tensorboard_commands_listen_on_the_loopback_only() -> None:
    texts = {path: path.read_text() for path in (ROOT / "Makefile", ROOT / "README.md",
             *(ROOT / "docs").glob("*.md"), *(ROOT / "mae_et" / "cli").glob("*.py"))}  # fmt: skip
    assert "--host 127.0.0.1" in texts[ROOT / "Makefile"]
    for path, text in texts.items():
        assert not re.search(r"bind_all|--host[ =](?!127\.0\.0\.1|localhost)", text), path
