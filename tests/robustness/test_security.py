"""No file runs code, and no file refers outside the folders that the user named."""

import argparse
import ast
import importlib.util
import io
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from fuzz.targets import classifier, hugging_face, prepared, run_checkpoint
from fuzz.watch import BAIT, nothing_runs
from PIL import Image
from sealing import seal_archive

from finetune.config import ClassifierConfig
from mae_et import UserError
from mae_et.checkpoints.encoders import load_encoder
from mae_et.checkpoints.formats import load_weights
from mae_et.checkpoints.run_config import read_only_data
from mae_et.checkpoints.store import newest_checkpoint
from mae_et.checkpoints.stored_settings import stored_config
from mae_et.cli.main import main
from mae_et.config.data import DataConfig
from mae_et.config.files import config_from_text, load_config, to_yaml
from mae_et.config.schema import PretrainConfig
from mae_et.data.datasets import open_dataset
from mae_et.data.sources.array_files import write_array
from mae_et.errors import RunFailed
from mae_et.io.seals import seal, sealed_bytes, unseal
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
    file = io.BytesIO()
    np.save(file, np.array([payload], dtype=object), allow_pickle=True)
    path.write_bytes(sealed_bytes(file.getvalue()))


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


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
    write(tmp_path, classifier())
    torch.save({"model": payload}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"is refused: it holds posix\.mkdir|cannot be read"):
        load_weights(tmp_path)


def test_pickle_in_a_listing_is_refused(payload: Payload, tmp_path: Path) -> None:
    save_png(tmp_path / "data" / "train" / "a" / "b.png")
    config = DataConfig(root=tmp_path / "data", listing=tmp_path / "kept")
    open_dataset(config, "train")
    (kept,) = (tmp_path / "kept").iterdir()
    save_objects(kept, payload)
    with pytest.raises(UserError, match=r"listing .* is damaged"):
        open_dataset(config, "train")


def test_pickle_in_a_prepared_index_is_refused(payload: Payload, tmp_path: Path) -> None:
    write(tmp_path / "train", prepared())
    save_objects(tmp_path / "train" / "00000.npy", payload)
    with pytest.raises(UserError, match=r"index .* is damaged"):
        open_dataset(DataConfig(name="shards", root=tmp_path), "train")


@pytest.mark.parametrize("name", ["x.npy", "x.png"])
@pytest.mark.parametrize("source", ["folder", "wds"])
def test_pickle_in_an_image_is_refused(
    payload: Payload, tmp_path: Path, name: str, source: str
) -> None:
    place = tmp_path / "train" / "a" / name
    place.parent.mkdir(parents=True)
    with place.open("wb") as file:
        np.save(file, np.array([payload], dtype=object), allow_pickle=True)
    if source == "wds":
        with tarfile.open(tmp_path / "train" / "0.tar", "w") as archive:
            archive.add(place, name)
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
    state = torch.load(write(tmp_path, {"c.pt": run_checkpoint()}) / "c.pt", weights_only=True)
    torch.save(state | {"config": CONFIGS[2]}, tmp_path / "c.pt")
    with pytest.raises(UserError, match="a config names no class"):
        load_weights(tmp_path / "c.pt")
    with pytest.raises(UserError, match="a config names no class"):
        stored_config(tmp_path / "c.pt")


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
    with nothing_runs(tmp_path):
        assert main(["pretrain", *flags]) == 0
        assert main(["pretrain", *flags]) == 0  # reads what is there
        assert main(knn) == 0


# --- paths in files -------------------------------------------------------------------------------


def save_png(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


@pytest.mark.parametrize("name", [b"../secret.png", b"/etc/passwd", b"a/../../secret.png", b"a\0b"])
def test_listing_with_paths_outside_its_folder_is_refused(tmp_path: Path, name: bytes) -> None:
    save_png(tmp_path / "data" / "train" / "a" / "b.png")
    save_png(tmp_path / "data" / "secret.png")
    config = DataConfig(root=tmp_path / "data", listing=tmp_path / "kept")
    open_dataset(config, "train")
    (kept,) = (tmp_path / "kept").iterdir()
    np.save(kept, np.array([name + b"!"], dtype=np.bytes_))
    array = np.load(kept)
    array[0] = name
    write_array(kept, array)
    with pytest.raises(UserError, match=r"outside of the folder\): delete it"):
        open_dataset(config, "train")


@pytest.mark.parametrize("level", ["/../../../secret", "../x", 8.5, True, 0, -8, None])
def test_prepared_split_with_invalid_levels_is_refused(tmp_path: Path, level: object) -> None:
    files = prepared()
    about = unseal(json.loads(files["split.json"])) | {"levels": [level]}
    write(tmp_path / "train", files | {"split.json": json.dumps(seal(about)).encode()})
    with pytest.raises(UserError, match=r"split.json is damaged"):
        open_dataset(DataConfig(name="shards", root=tmp_path), "train")


def test_prepared_index_beyond_its_archive_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train", prepared())
    rows = np.load(tmp_path / "train" / "00000.npy")
    rows["size"] = 2**62
    write_array(tmp_path / "train" / "00000.npy", rows)
    with pytest.raises(RunFailed, match="the archive ends before it"):
        open_dataset(DataConfig(name="shards", root=tmp_path), "train")[0]


def test_archive_members_are_never_extracted(tmp_path: Path) -> None:
    save_png(tmp_path / "p.png")
    (tmp_path / "train").mkdir()
    with tarfile.open(tmp_path / "train" / "0.tar", "w") as archive:
        archive.add(tmp_path / "p.png", "../../../evil.png")
        link = tarfile.TarInfo("passwd.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    with nothing_runs(tmp_path):
        source = open_dataset(DataConfig(name="wds", root=tmp_path), "train")
        assert len(source) == 1  # the link is no image
        assert source[0][0].size == (8, 8)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("label", ["-2", "999999999999", "1" * 70])
def test_out_of_range_label_is_refused(tmp_path: Path, label: str) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "a.cls").write_text(label)
    (tmp_path / "train").mkdir()
    with tarfile.open(tmp_path / "train" / "0.tar", "w") as archive:
        archive.add(tmp_path / "a.png", "a.png")
        archive.add(tmp_path / "a.cls", "a.cls")
    with pytest.raises(UserError, match="not a readable WebDataset shard"):
        open_dataset(DataConfig(name="wds", root=tmp_path), "train")


def test_paths_in_a_checkpoint_are_never_written_to(tmp_path: Path) -> None:
    """An untrusted checkpoint names an output, a listing and a download; none is used."""
    evil = tmp_path / "evil"
    config = load_config(
        PretrainConfig, [],
        [f"--output.dir={evil / 'run'}", f"--data.listing={evil / 'kept'}",
         f"--data.root={evil / 'data'}", "--data.name=cifar10"],
    )  # fmt: skip
    state = torch.load(write(tmp_path, {"c.pt": run_checkpoint()}) / "c.pt", weights_only=True)
    text = to_yaml(config)
    model = to_yaml(stored_config(tmp_path / "c.pt"))
    text = model[: model.index("data:")] + text[text.index("data:") :]
    torch.save(state | {"config": text}, tmp_path / "c.pt")
    save_png(tmp_path / "own.png")
    home = tmp_path / "home"
    with nothing_runs(home):
        home.mkdir()
        given = [f"--checkpoint={tmp_path / 'c.pt'}"]
        assert main(["knn", *given]) == 2  # its data are not there, and are not fetched
        images = [f"--images=[{tmp_path / 'own.png'}]", f"--output={home / 'p.png'}"]
        assert main(["reconstruct", *given, *images, "--device=cpu"]) == 0
        assert main(["export", *given, "--format=timm", f"--output={home / 'e.safetensors'}"]) == 0
    assert not evil.exists()
    assert {path.name for path in home.iterdir()} >= {"p.png", "e.safetensors"}


def test_stored_data_config_is_read_only(tmp_path: Path) -> None:
    stored = DataConfig(name="cifar10", root=tmp_path, listing=tmp_path)
    assert read_only_data(stored) == DataConfig(name="cifar10", root=tmp_path, download=False)
    assert read_only_data(DataConfig(name="cifar10")).download  # to our own data/cifar10
    gone = DataConfig(name="hfds/x", root=tmp_path / "gone")
    assert read_only_data(gone).root is None
    assert read_only_data(DataConfig(name="hfds/x", root=tmp_path)).root == tmp_path


# --- downloads ------------------------------------------------------------------------------------

HUB = "vit_tiny_patch16_224.augreg_in21k"


def test_pickle_on_the_timm_hub_is_refused(payload: Payload, tmp_path: Path, monkeypatch) -> None:
    """It lies in the cache of the hub, which cannot be reached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commit, folder = "0" * 40, tmp_path / f"models--timm--{HUB}"
    write(folder, {"refs/main": commit.encode(), f"snapshots/{commit}/README.md": b""})
    torch.save({"cls_token": payload}, folder / "snapshots" / commit / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"cannot fetch .* posix\.mkdir"):
        load_weights(Path(HUB))


def test_hugging_face_dataset_script_never_runs(payload: Payload, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "mine"
    write(folder, {"mine.py": b"import os\nos.mkdir(os.environ['PAYLOAD'])\n"})
    (folder / "train.pkl").write_bytes(pickle.dumps(payload))
    with pytest.raises(UserError, match="cannot be opened"):
        open_dataset(DataConfig(name=f"hfds/{folder}", root=tmp_path / "cache"), "train")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_torchvision_dataset_with_a_wrong_checksum_is_refused(name: str, tmp_path: Path) -> None:
    folder = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]
    for file in ("data_batch_1", "train", "test", "meta", "batches.meta"):
        write(tmp_path, {f"{folder}/{file}": b"changed"})
    with pytest.raises(UserError, match=r"is not in .*, and data.download is off"):
        open_dataset(DataConfig(name=name, root=tmp_path, download=False), "train")


# --- connections ---------------------------------------------------------------------------------


def test_tensorboard_commands_listen_on_the_loopback_only() -> None:
    texts = {path: path.read_text() for path in (ROOT / "Makefile", ROOT / "README.md",
             *(ROOT / "docs").glob("*.md"), *(ROOT / "mae_et" / "cli").glob("*.py"))}  # fmt: skip
    assert "--host 127.0.0.1" in texts[ROOT / "Makefile"]
    for path, text in texts.items():
        assert not re.search(r"bind_all|--host[ =](?!127\.0\.0\.1|localhost)", text), path
