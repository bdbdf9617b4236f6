"""A cache of decoded images changes no number (`data.cache: ram`)."""

import errno
import math
import os
import pickle
import tarfile
from dataclasses import replace
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import broken, unusual
from image_files import npy
from natural_images import jpeg, natural
from torch.utils.data import DataLoader, Dataset

from finetune.config import ClassifierConfig, NetworkConfig, RecipeConfig
from finetune.training.transforms import LabelledTrainDataset
from mae_et import UserError
from mae_et.config.commands import PrepareConfig
from mae_et.config.data import DataConfig
from mae_et.config.efficiency import EfficiencyConfig
from mae_et.config.schema import CropConfig, PretrainConfig
from mae_et.curriculum.schedule import Curriculum, Stage
from mae_et.data import cache
from mae_et.data.bad_images import WithSubstitutes
from mae_et.data.cache import CachedDataset, cache_images
from mae_et.data.datasets import open_dataset
from mae_et.data.loader import data_loader
from mae_et.data.prepare import prepare
from mae_et.data.sampler import CurriculumBatchSampler, SampleIndex
from mae_et.data.shared_buffer import SharedBuffer
from mae_et.data.train_dataset import TrainDataset
from mae_et.runtime import distributed
from mae_et.runtime.distributed import DistributedContext
from mae_et.training.plan import micro_batch_size

STAGES = (Stage(16, 1, 3), Stage(32, 1, 7))
WORLD = DistributedContext(0, 1, torch.device("cpu"))


def cached(data: DataConfig, channels: int = 3, num_workers: int = 0) -> tuple:
    """Return a dataset and its cache."""
    config = PretrainConfig(data=data, efficiency=EfficiencyConfig(num_workers=num_workers))
    source = open_dataset(data, "train", channels)
    found = cache_images(source, config, WORLD)
    return source, found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder of JPEGs, of every unusual file, and of some that cannot be read."""
    root = tmp_path_factory.mktemp("images")
    files = {f"{n}.jpg": jpeg(natural(40 + n, 50 - 2 * n, n)) for n in range(8)}
    for name, content in (files | unusual() | broken()).items():
        path = root / "train" / str(len(name) % 2) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


@pytest.fixture(scope="module", params=["folder", "shards", "wds", "synthetic"])
def data(request, folder: Path, tmp_path_factory) -> DataConfig:
    """Return the config of a dataset of each kind; all but the last hold the same images."""
    kind = request.param
    root = tmp_path_factory.mktemp(kind)
    if kind == "synthetic":
        return DataConfig(cache="ram", synthetic_train=9, synthetic_size=40)
    if kind == "folder":
        return DataConfig(root=folder, cache="ram")
    if kind == "shards":
        plain = DataConfig(root=folder, max_bad_fraction=1)
        prepare(PrepareConfig(root, plain, splits=("train",), levels=(24,)))
    else:
        with tarfile.open(root / "all-train-0.tar", "w") as tar:
            for path in sorted((folder / "train").rglob("*.*")):
                tar.add(path, path.name)
    return DataConfig(name=kind, root=root, cache="ram")


def test_views_are_those_of_the_files_bit_for_bit(data: DataConfig) -> None:
    """Of every kind of dataset, substitutes of unreadable images included."""
    source, images = cached(data)
    assert isinstance(images, CachedDataset)
    plan = Curriculum(STAGES, 32, 8).plan(2, len(source), 4)
    recipe = RecipeConfig(erasing=0.5)
    for expected, found in (
        (TrainDataset(of, data, plan, 8, 0) for of in (source, images)),
        (LabelledTrainDataset(of, data, recipe, plan, 0) for of in (source, images)),
    ):
        for sample in range(len(source)):
            index = SampleIndex(sample, 1, sample % 2)
            pair = WithSubstitutes(expected)[index], WithSubstitutes(found)[index]
            assert all(map(torch.equal, *pair))


@pytest.mark.parametrize("kind", [np.uint8, np.float32, np.uint16])
def test_arrays_keep_their_values(tmp_path: Path, kind: type) -> None:
    for number in range(3):
        array = np.random.default_rng(number).integers(0, 255, (9 + number, 12, 5)).astype(kind)
        (tmp_path / "train").mkdir(exist_ok=True)
        (tmp_path / "train" / f"{number}.npy").write_bytes(npy(array))
    statistics = {"mean": (0.5,), "std": (0.2,), "max_value": 255.0}
    source, images = cached(DataConfig(root=tmp_path, cache="ram", **statistics), 5)  # type: ignore[arg-type]
    for index in range(3):
        assert images[index][0].dtype == source[index][0].dtype
        assert torch.equal(images[index][0], source[index][0])


def test_loader_processes_fill_and_read_it(folder: Path) -> None:
    data = DataConfig(root=folder, cache="ram")
    source, images = cached(data, num_workers=2)
    plan = Curriculum(STAGES, 32, 8).plan(2, len(source), 8)
    order = CurriculumBatchSampler(plan, 0, micro_batch_size(None, plan, 1))

    def loaded(of: Dataset, workers: int) -> DataLoader:
        view = WithSubstitutes(TrainDataset(of, data, plan, 8, 0))
        return data_loader(view, workers, batch_sampler=order)

    for expected, found in zip(loaded(source, 0), loaded(images, 2), strict=True):
        assert all(map(torch.equal, expected, found))


def test_spawned_processes_and_other_ranks_read_the_same_memory(folder: Path) -> None:
    source, images = cached(DataConfig(root=folder, cache="ram"))
    pickled = ForkingPickler.dumps(images)
    assert len(pickled) < 20_000
    attached = SharedBuffer.attach(images.buffer.address())
    for other in (pickle.loads(pickled), CachedDataset(source, attached, images.entries)):
        stored = np.flatnonzero(images.entries[:, 0])
        assert len(stored) > 8
        for index in stored[:5].tolist():
            assert np.array_equal(other[index][0], source[index][0])


def test_waiting_ranks_attach_to_the_first_ones_buffer_and_to_no_other(
    folder: Path, monkeypatch, capsys
) -> None:
    """While the first rank decodes, each flag that it raises is a heartbeat of the others.

    A number of a process means another one in another container: its file differs.
    """
    data = DataConfig(root=folder, cache="ram")
    config = PretrainConfig(data=data, efficiency=EfficiencyConfig(num_workers=0))
    source = open_dataset(data, "train", 3)
    raised: list[bool] = []
    monkeypatch.setattr(cache, "ROUND_SECONDS", 0.0)
    monkeypatch.setattr(cache, "ROWS_AT_ONCE", 4)
    monkeypatch.setattr(distributed, "any_rank", lambda flag, _: raised.append(flag) or flag)
    monkeypatch.setattr(distributed, "all_gather", lambda values, _: torch.stack([values] * 2))
    first = cache_images(source, config, replace(WORLD, size=2))
    assert isinstance(first, CachedDataset)
    assert raised == [True] * math.ceil(len(source) / 4) + [False]

    def gather(values: torch.Tensor, _: DistributedContext) -> torch.Tensor:
        """Return both machines' numbers, which are equal, and later the buffer's address."""
        return torch.stack([torch.tensor(address) if values.ndim else values, values])

    beats: list[int] = []
    monkeypatch.setattr(cache, "heartbeat", lambda: beats.append(1))
    monkeypatch.setattr(distributed, "any_rank", lambda flag, _: flag or raised.pop(0))
    monkeypatch.setattr(distributed, "all_gather", gather)
    rounds, address = len(raised), first.buffer.address()
    second = cache_images(source, config, replace(WORLD, rank=1, size=2))
    assert len(beats) == rounds - 1
    assert not raised
    assert np.array_equal(second.entries, first.entries)
    capsys.readouterr()
    raised[:], address[2] = [False], address[2] + 1
    assert cache_images(source, config, replace(WORLD, rank=1, size=2)) is source
    assert "rank 1 cannot share the memory" in capsys.readouterr().err


@pytest.mark.parametrize("mebibytes", [0, 0.02])
def test_images_that_do_not_fit_are_read_from_files(
    folder: Path, monkeypatch, capsys, mebibytes: float
) -> None:
    """All of them where it is known before, or those for which no memory is left."""
    monkeypatch.setattr(cache, "available_host_memory", lambda: int(mebibytes * 2**20))
    if mebibytes:
        monkeypatch.setattr(cache, "PROBED", 0)  # nothing is known before
    source, images = cached(DataConfig(root=folder, cache="ram"))
    said = capsys.readouterr().err
    assert said.count("data.cache ram") == 1
    assert "read from files" in said
    assert (images is source) == (mebibytes == 0)
    last = next(i for i in range(len(source)) if str(source.name(i)).endswith("/7.jpg"))
    assert np.array_equal(images[last][0], source[last][0])


def test_images_beyond_a_limit_on_files_are_read_from_files(folder: Path, monkeypatch) -> None:
    """`ulimit -f` covers shared memory."""
    real = SharedBuffer.write

    def write(buffer: SharedBuffer, array: np.ndarray, offset: int) -> None:
        if offset > 20_000:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        real(buffer, array, offset)

    monkeypatch.setattr(SharedBuffer, "write", write)
    source, images = cached(DataConfig(root=folder, cache="ram"))
    assert images.entries[:, 0].any()
    last = next(i for i in range(len(source)) if str(source.name(i)).endswith("/7.jpg"))
    assert images.entries[last, 0] == cache.NOT_STORED
    assert np.array_equal(images[last][0], source[last][0])


@pytest.mark.parametrize(
    "config", [PretrainConfig, partial(ClassifierConfig, model=NetworkConfig(backbone="resnet18"))]
)
def test_what_needs_files_is_refused_with_a_cache(config) -> None:
    data = DataConfig(cache="ram")
    with pytest.raises(UserError, match=r"data\.cache ram .* crop\.method fourier or resize"):
        config(data=data, crop=CropConfig("decode"))
