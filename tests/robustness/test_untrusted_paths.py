"""No file refers outside the folders that the user named, or beyond its own data."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz.valid_files import prepared, run_checkpoint
from fuzz.watch import nothing_runs
from image_files import refusal, save, write_files, write_shard

from mae_et.checkpoints.run_config import read_only_data
from mae_et.checkpoints.source import recognise
from mae_et.cli.main import main
from mae_et.config.data import DataConfig
from mae_et.config.files import load_config, to_yaml
from mae_et.config.schema import PretrainConfig
from mae_et.data.datasets import open_dataset
from mae_et.data.sources.array_files import write_array
from mae_et.errors import RunFailed
from mae_et.io.seals import seal, unseal


@pytest.mark.parametrize("name", [b"../secret.png", b"/etc/passwd", b"a/../../secret.png", b"a\0b"])
def test_listing_with_paths_outside_its_folder_is_refused(tmp_path: Path, name: bytes) -> None:
    save(tmp_path / "data" / "train" / "a" / "b.png")
    save(tmp_path / "data" / "secret.png")
    config = DataConfig(root=tmp_path / "data", listing=tmp_path / "kept")
    open_dataset(config, "train")
    (kept,) = (tmp_path / "kept").iterdir()
    array = np.array([name + b"!"])  # as wide as the name with a NUL, which NumPy cuts off
    array[0] = name
    write_array(kept, array)
    assert "outside of the folder): delete it" in refusal(config)


@pytest.mark.parametrize("level", ["/../../../secret", "../x", 8.5, True, 0, -8, None])
def test_prepared_split_with_invalid_levels_is_refused(tmp_path: Path, level: object) -> None:
    files = prepared()
    about = unseal(json.loads(files["split.json"])) | {"levels": [level]}
    write_files(tmp_path / "train", files | {"split.json": json.dumps(seal(about)).encode()})
    assert "split.json is damaged" in refusal(DataConfig(name="shards", root=tmp_path))


def test_prepared_index_beyond_its_archive_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path / "train", prepared())
    rows = np.load(tmp_path / "train" / "00000.npy")
    rows["size"] = 2**62
    write_array(tmp_path / "train" / "00000.npy", rows)
    with pytest.raises(RunFailed, match="the archive ends before it"):
        open_dataset(DataConfig(name="shards", root=tmp_path), "train")[0]


def test_archive_members_are_never_extracted(tmp_path: Path) -> None:
    save(tmp_path / "p.png")
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
        assert source[0][0].size == (6, 4)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("label", ["-2", "999999999999", "1" * 70])
def test_out_of_range_label_is_refused(tmp_path: Path, label: str) -> None:
    write_shard(tmp_path / "train" / "0.tar", {"a.png": b"", "a.cls": label.encode()})
    assert "not a readable WebDataset shard" in refusal(DataConfig(name="wds", root=tmp_path))


def test_paths_in_a_checkpoint_are_never_written_to(tmp_path: Path) -> None:
    """An untrusted checkpoint names an output, a listing and a download; none is used."""
    evil = tmp_path / "evil"
    config = load_config(
        PretrainConfig, [],
        [f"--output.dir={evil / 'run'}", f"--data.listing={evil / 'kept'}",
         f"--data.root={evil / 'data'}", "--data.name=cifar10"],
    )  # fmt: skip
    state = torch.load(
        write_files(tmp_path, {"c.pt": run_checkpoint()}) / "c.pt", weights_only=True
    )
    text = to_yaml(config)
    model = to_yaml(recognise(tmp_path / "c.pt").config())
    text = model[: model.index("data:")] + text[text.index("data:") :]
    torch.save(state | {"config": text}, tmp_path / "c.pt")
    save(tmp_path / "own.png")
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
