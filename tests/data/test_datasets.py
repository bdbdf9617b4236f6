import gzip
import importlib.util
import io
import os
import pickle
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import mae_et.data.datasets as sources
from mae_et.config.schema import DataConfig
from mae_et.data.datasets import ImageDataset, count_unlabelled, open_dataset
from mae_et.data.decoding import PIL_MODES, to_channels
from mae_et.data.image_folder import ImageFolder, classes_without_images, image_names, list_images
from mae_et.data.synthetic import CLASSES, Synthetic
from mae_et.data.transforms import EvalDataset
from mae_et.errors import RunFailed, UserError


def picture(value: int = 0, mode: str = "RGB", size: tuple[int, int] = (6, 4)) -> Image.Image:
    return Image.new("L", size, value).convert(mode)


def save(path: Path, value: int = 0, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(value).save(path, **options)
    return path


def encoded(value: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    picture(value).save(file, kind)
    return file.getvalue()


def folder(root: Path, train_split: str = "train", val_split: str = "val") -> DataConfig:
    return DataConfig(root=root, train_split=train_split, val_split=val_split)


def values(source: ImageDataset) -> list[tuple[int, int]]:
    """Return each image's first grey value, and its label."""
    found = []
    for i in range(len(source)):
        image, label = source[i]
        assert isinstance(image, Image.Image)
        found.append((image.convert("L").getpixel((0, 0)), label))
    return found  # type: ignore[return-value]


def refusal(config: DataConfig, split: sources.Split = "train", channels: int = 3) -> str:
    """Return the one sentence in which a data set is refused."""
    with pytest.raises(UserError) as raised:
        open_dataset(config, split, channels)
    sentence = str(raised.value)
    assert "\n" not in sentence
    return sentence


# --- folders --------------------------------------------------------------------------------------


def test_a_folder_with_splits_and_classes_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for value, name in enumerate(("train/b/0.png", "train/b/1.PNG", "train/a/deep/er/2.png")):
        save(tmp_path / name, value)
    save(tmp_path / "val/b/3.png", 3)
    (tmp_path / "train/a/notes.txt").write_text("no image")
    train, val = open_dataset(folder(tmp_path), "train"), open_dataset(folder(tmp_path), "val")
    assert list(train.classes) == ["a", "b"]
    assert values(train) == [(2, 0), (0, 1), (1, 1)]
    assert values(val) == [(3, 1)]


def test_labels_of_val_are_numbered_as_in_train_even_if_val_lacks_classes(tmp_path: Path) -> None:
    for name in ("train/a/0.png", "train/b/0.png", "train/c/0.png", "val/c/0.png"):
        save(tmp_path / name)
    val = open_dataset(folder(tmp_path), "val")
    assert [label for _, label in values(val)] == [2]
    assert list(val.classes) == ["a", "b", "c"]


def test_a_class_that_only_val_has_is_refused_by_name(tmp_path: Path) -> None:
    for name in ("train/a/0.png", "val/a/0.png", "val/zebra/0.png"):
        save(tmp_path / name)
    assert "zebra" in refusal(folder(tmp_path), "val")
    assert len(open_dataset(folder(tmp_path), "train")) == 1


def test_a_split_with_a_file_outside_the_class_folders_is_unlabelled(tmp_path: Path) -> None:
    for name in ("train/a/0.png", "train/b/0.png", "val/a/0.png", "val/loose.png"):
        save(tmp_path / name)
    val = open_dataset(folder(tmp_path), "val")
    assert {label for _, label in values(val)} == {-1}
    assert list(val.classes) == []
    save(tmp_path / "train/loose.png")
    (tmp_path / "val/loose.png").unlink()
    for split in ("train", "val"):
        source = open_dataset(folder(tmp_path), split)
        assert {label for _, label in values(source)} == {-1}


def test_splits_may_have_other_names(tmp_path: Path) -> None:
    save(tmp_path / "fit/a/0.png", 5)
    save(tmp_path / "test/a/0.png", 6)
    config = folder(tmp_path, "fit", "test")
    assert values(open_dataset(config, "train")) == [(5, 0)]
    assert values(open_dataset(config, "val")) == [(6, 0)]
    assert "no folder training" in refusal(folder(tmp_path, "training", "test"))
    assert "no folder training" in refusal(folder(tmp_path, "training", "tset"))


@pytest.mark.parametrize(("there", "asked"), [("train", "val"), ("val", "train")])
def test_a_missing_split_beside_another_is_refused(
    tmp_path: Path, there: str, asked: sources.Split
) -> None:
    save(tmp_path / there / "a/0.png")
    assert f"has no {asked} split" in refusal(folder(tmp_path), asked)


def test_without_splits_a_fifth_of_each_class_is_held_out(tmp_path: Path) -> None:
    for name, count in (("a", 10), ("b", 25), ("c", 4)):
        for i in range(count):
            save(tmp_path / name / f"{i}.png")
    train, val = (open_dataset(folder(tmp_path), split) for split in ("train", "val"))
    assert isinstance(train, ImageFolder)
    assert isinstance(val, ImageFolder)
    names = [{str(s.name(i)) for i in range(len(s))} for s in (train, val)]
    assert not names[0] & names[1]
    assert names[0] | names[1] == {str(path) for path in tmp_path.rglob("*.png")}
    assert [[label for _, label in values(val)].count(i) for i in range(3)] == [2, 5, 0]
    assert list(train.classes) == list(val.classes) == ["a", "b", "c"]


def test_what_is_held_out_depends_on_names_alone_and_survives_additions(tmp_path: Path) -> None:
    def held_out(root: Path) -> set[str]:
        source = open_dataset(folder(root), "val")
        assert isinstance(source, ImageFolder)
        return {str(Path(str(source.name(i))).relative_to(root)) for i in range(len(source))}

    here, there = tmp_path / "here", tmp_path / "there"
    for i in range(20):
        save(here / f"{i}.png", i)
        save(there / f"{19 - i}.png", 7)
    before = held_out(here)
    assert len(before) == 4
    assert before == held_out(there)
    assert before != set(sorted(f"{i}.png" for i in range(20))[:4])
    save(here / "new.png")
    assert len(before - held_out(here)) <= 1


def test_too_few_images_to_hold_one_out_are_refused_for_val_only(tmp_path: Path) -> None:
    for i in range(4):
        save(tmp_path / f"{i}.png")
    assert len(open_dataset(folder(tmp_path), "train")) == 4
    assert "too few images" in refusal(folder(tmp_path), "val")


def test_a_flat_folder_is_unlabelled(tmp_path: Path) -> None:
    for i in range(10):
        save(tmp_path / f"{i}.png", i)
    train, val = open_dataset(folder(tmp_path), "train"), open_dataset(folder(tmp_path), "val")
    assert sorted(values(train) + values(val)) == [(i, -1) for i in range(10)]
    assert len(val) == 2
    assert list(train.classes) == []


def test_missing_and_empty_folders_are_refused(tmp_path: Path) -> None:
    assert f"{tmp_path / 'no'} is not a folder" in refusal(folder(tmp_path / "no"))
    assert "data.root is needed" in refusal(DataConfig(name="folder"))
    (tmp_path / "notes.txt").write_text("no image")
    sentence = refusal(folder(tmp_path))
    assert "there is no image" in sentence
    assert ".jpeg" in sentence
    (tmp_path / "train").mkdir()
    assert f"no image in {tmp_path / 'train'} " in refusal(folder(tmp_path))
    with pytest.raises(UserError, match="cannot list the folder"):
        list_images(tmp_path / "no")


def test_hidden_files_are_skipped_and_links_followed_but_never_in_circles(tmp_path: Path) -> None:
    save(tmp_path / "photos/a.JPG")
    save(tmp_path / "photos/._b.jpg", format="JPEG")
    save(tmp_path / "photos/.thumbnails/a.jpg")
    save(tmp_path / "elsewhere/c.jpg")
    save(tmp_path / "elsewhere/d.jpg")
    (tmp_path / "photos/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos/e.jpg").symlink_to(tmp_path / "elsewhere/d.jpg")
    (tmp_path / "photos/linked/circle").symlink_to(tmp_path / "photos")
    (tmp_path / "photos/circle").symlink_to(".")
    assert image_names(tmp_path / "photos") == ["a.JPG", "e.jpg", "linked/c.jpg", "linked/d.jpg"]
    assert len(open_dataset(folder(tmp_path / "photos"), "train")) == 4


def test_a_name_that_is_no_valid_text_is_read_like_any_other(tmp_path: Path) -> None:
    content = save(tmp_path / "0.png", 9).read_bytes()
    for i in range(9):
        with open(os.fsencode(tmp_path) + b"/\xff%d.png" % i, "wb") as file:  # noqa: PTH123
            file.write(content)
    train, val = open_dataset(folder(tmp_path), "train"), open_dataset(folder(tmp_path), "val")
    assert values(train) + values(val) == [(9, -1)] * 10


def test_an_unreadable_file_fails_the_run_by_name(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    damaged = {
        "noise.jpg": b"no image at all",
        "empty.png": b"",
        "cut.png": whole[: len(whole) // 2],
        "noise.npy": b"\x93NUMPY\x01\x00garbage",
        "objects.npy": _npy(np.array([[None]])),
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "broken-link.png").symlink_to("nowhere")
    source = ImageFolder(sorted(tmp_path.iterdir()), [0] * 7, ["a"], 3)
    for i in range(6):
        with pytest.raises(RunFailed) as raised:
            source[i]
        assert str(source.name(i)) in str(raised.value)
        assert "\n" not in str(raised.value)
    assert source[6][1] == 0
    with pytest.raises(IndexError):
        source[7]


# --- what files may hold --------------------------------------------------------------------------


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def read_one(path: Path, channels: int) -> Image.Image | torch.Tensor:
    return ImageFolder([path], [0], [], channels)[0][0]


@pytest.mark.parametrize("channels", [1, 2, 5, 13])
@pytest.mark.parametrize("kind", ["uint8", "uint16", "float64"])
def test_arrays_of_any_channels_are_read_through_to_a_view(
    tmp_path: Path, channels: int, kind: str
) -> None:
    array = (np.random.default_rng(0).random((40, 32, channels)) * 250).astype(kind)
    np.save(tmp_path / "0.npy", array)
    save(tmp_path / "preview.png")  # a picture has no 13 channels
    if channels == 1:
        (tmp_path / "preview.png").unlink()
        np.save(tmp_path / "0.npy", array[..., 0])
    source = open_dataset(folder(tmp_path), "train", channels)
    image, label = source[0]
    assert len(source) == 1
    assert isinstance(image, torch.Tensor)
    assert image.dtype == (torch.uint8 if kind == "uint8" else torch.float32)
    np.testing.assert_array_equal(
        image.numpy(), array.astype(image.numpy().dtype).transpose(2, 0, 1)
    )
    view, _ = EvalDataset(source, DataConfig(), 16)[0]
    assert view.shape == (channels, 16, 16)
    assert label == -1


def test_an_array_of_other_channels_fails_the_run_by_name(tmp_path: Path) -> None:
    for shape in ((4, 4, 5), (4,), (2, 4, 4, 3), (3, 4, 4)):
        np.save(tmp_path / "array.npy", np.zeros(shape))
        with pytest.raises(RunFailed, match=r"array\.npy: an array of shape .* of 3 channels"):
            read_one(tmp_path / "array.npy", 3)


def test_pictures_are_refused_for_channels_that_they_cannot_have(tmp_path: Path) -> None:
    save(tmp_path / "0.png")
    assert "(of 13 channels: .npy)" in refusal(folder(tmp_path), channels=13)
    assert "model.channels 2 needs arrays" in refusal(DataConfig(), channels=2)
    with pytest.raises(UserError, match=r"model\.channels 5 needs arrays"):
        read_one(tmp_path / "0.png", 5)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path, channels: int, suffix: str) -> None:
    grey = np.array([[0, 255, 256, 0x7FFF], [0x8000, 0xFEFF, 0xFF00, 0xFFFF]], np.uint16)
    Image.fromarray(grey).save(
        tmp_path / f"deep{suffix}", format="PPM" if suffix == ".pgm" else None
    )
    image = read_one(tmp_path / f"deep{suffix}", channels)
    assert isinstance(image, Image.Image)
    pixels = np.asarray(image).reshape(2, 4, channels)
    for channel in range(min(channels, 3)):
        assert pixels[..., channel].tolist() == [[0, 0, 1, 127], [128, 254, 255, 255]]
    assert channels < 4 or (pixels[..., 3] == 255).all()


def test_numbers_of_unknown_range_are_refused_instead_of_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((2, 2), 0.5, np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((2, 2), 70_000, np.int32)).save(tmp_path / "int.tif")
    for name in ("float.tif", "int.tif"):
        with pytest.raises(RunFailed, match=rf"{name}: .*\.npy"):
            read_one(tmp_path / name, 3)


@pytest.mark.filterwarnings("error")
def test_a_palette_with_transparency_keeps_its_colours(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "palette.png", transparency=bytes([0, 128]))
    rgb, rgba = read_one(tmp_path / "palette.png", 3), read_one(tmp_path / "palette.png", 4)
    assert np.asarray(rgb).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    assert np.asarray(rgba).tolist() == [[[10, 20, 30, 0], [200, 100, 50, 128]]]


def test_modes_that_torchvision_s_folder_reads_are_read_as_it_does(tmp_path: Path) -> None:
    made = {
        "cmyk.jpg": Image.new("CMYK", (8, 8), (10, 200, 30, 40)),
        "grey-alpha.png": Image.new("LA", (8, 8), (77, 20)),
        "bits.png": Image.new("1", (8, 8), 1),
        "alpha.webp": Image.new("RGBA", (8, 8), (1, 2, 3, 255)),
        "grey.bmp": Image.new("L", (8, 8), 9),
    }
    for name, image in made.items():
        image.save(tmp_path / name)
        ours = read_one(tmp_path / name, 3)
        assert isinstance(ours, Image.Image)
        assert ours.mode == "RGB"
        assert ours.tobytes() == Image.open(tmp_path / name).convert("RGB").tobytes()


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    assert np.asarray(read_one(tmp_path / "two.gif", 3))[0, 0].tolist() == [255, 0, 0]


def test_a_rotation_in_the_exif_data_is_left_alone_as_in_mae(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "photo.jpg", exif=exif)
    image = read_one(tmp_path / "photo.jpg", 3)
    assert isinstance(image, Image.Image)
    assert image.size == (6, 4)


def test_a_source_travels_to_loader_processes(tmp_path: Path) -> None:
    for i in range(4):
        save(tmp_path / f"{i}.png", i)
    source = pickle.loads(pickle.dumps(open_dataset(folder(tmp_path), "train", 1)))
    loader = DataLoader(EvalDataset(source, DataConfig(eval_crop=1.0), 4), 2, num_workers=1)
    assert [int(image[0, 0, 0]) for images, _ in loader for image in images] == [0, 1, 2, 3]


# --- tar shards -----------------------------------------------------------------------------------


def write_shard(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        folder = tarfile.TarInfo("folder.png")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    return path


def shards(root: Path, **splits: str) -> DataConfig:
    return DataConfig(name="wds", root=root, **splits)  # type: ignore[arg-type]


def test_shards_are_read_at_random_places_in_the_order_of_names(tmp_path: Path) -> None:
    write_shard(tmp_path / "1.tar", {"b.cls": b"1", "b.jpg": encoded(70, "JPEG")})
    write_shard(tmp_path / "0.tar", {"a.png": encoded(5), "a.cls": b"3\n", "c.png": encoded(6)})
    source = open_dataset(shards(tmp_path), "train")
    assert values(source) == [(5, 3), (6, -1), (70, 1)]
    assert source[-1][1] == 1
    assert list(source.classes) == ["0", "1", "2", "3"]


def test_a_key_ends_at_the_first_dot_of_the_file_s_name(tmp_path: Path) -> None:
    files = {
        "v1.0/a.png": encoded(1), "v1.0/a.cls": b"4", "a.png": encoded(2), "./a.cls": b"7",
        "v1.0/a.mask.png": encoded(3), "v1.0/b.c.png": encoded(4), "v1.0/b.cls": b"5",
        "c.JPG": encoded(5), "c.json": b"{}", "long/" + 120 * "n" + "/d.png": encoded(6),
    }  # fmt: skip
    write_shard(tmp_path / "0.tar", files)
    assert values(open_dataset(shards(tmp_path), "train")) == [(1, 4), (2, -1), (5, -1), (6, -1)]


def test_shards_may_hold_arrays(tmp_path: Path) -> None:
    array = np.arange(4 * 4 * 7, dtype=np.uint8).reshape(4, 4, 7)
    write_shard(tmp_path / "0.tar", {"a.npy": _npy(array), "a.png": encoded(0)})
    image, _ = open_dataset(shards(tmp_path), "train", 7)[0]
    assert isinstance(image, torch.Tensor)
    assert torch.equal(image, torch.from_numpy(array).permute(2, 0, 1))


def test_shards_of_a_split_lie_in_its_folder_or_bear_its_name(tmp_path: Path) -> None:
    for name in ("in/train/0.tar", "in/val/0.tar", "by/set-train-000.tar", "by/set-val-000.tar",
                 "by/set-retrieval-000.tar", "one/0.tar", "one/x_val_1.tar"):  # fmt: skip
        write_shard(tmp_path / name, {"a.png": encoded(len(name))})
    for root, train, val in (("in", 14, 12), ("by", 20, 18), ("one", 9, 15)):
        assert values(open_dataset(shards(tmp_path / root), "train")) == [(train, -1)]
        assert values(open_dataset(shards(tmp_path / root), "val")) == [(val, -1)]
    other = shards(tmp_path / "by", val_split="retrieval")
    assert values(open_dataset(other, "val")) == [(24, -1)]


def test_shards_without_a_val_split_or_an_image_are_refused(tmp_path: Path) -> None:
    assert "no train shards" in refusal(shards(tmp_path))
    assert "is not a folder" in refusal(shards(tmp_path / "no"))
    assert "data.root is needed" in refusal(DataConfig(name="wds"))
    write_shard(tmp_path / "0.tar", {"img.001.png": encoded(1), "a.cls": b"1"})
    assert "no val shards" in refusal(shards(tmp_path), "val")
    assert "without a dot in KEY" in refusal(shards(tmp_path))
    write_shard(tmp_path / "0.tar", {"a.png": encoded(1), "a.cls": b"1"})
    assert "no image of 5 channels" in refusal(shards(tmp_path), channels=5)


def test_a_damaged_shard_is_refused_by_name(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "0.tar", {f"{i}.png": encoded(i) for i in range(4)})
    whole = path.read_bytes()
    size = len(encoded(0))
    assert size <= 512  # so the headers lie at multiples of 1024
    cuts = {
        "in a file": whole[: 1024 + 512 + size // 2],
        "in a header": whole[: 2048 + 300],
        "a header overwritten": whole[:2048] + b"x" * 512 + whole[2560:],
        "no archive": b"no archive at all",
        "empty": b"",
        "compressed": gzip.compress(whole),
    }
    for content in cuts.values():
        path.write_bytes(content)
        assert f"{path} is not a readable WebDataset shard" in refusal(shards(tmp_path))
    write_shard(path, {"a.png": encoded(0), "a.cls": b"cat"})
    assert "is not a readable WebDataset shard" in refusal(shards(tmp_path))


def test_an_unreadable_image_in_a_shard_fails_the_run_by_its_place(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "0.tar", {"a.png": encoded(0), "b.png": b"noise"})
    source = open_dataset(shards(tmp_path), "train")
    with pytest.raises(RunFailed, match=rf"at byte 1536 of {path}: it is neither a picture"):
        source[1]


# --- torchvision's sets ---------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("<urlopen error\nno network>")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def write_cifar(root: Path, hundred: bool) -> None:
    """Write files in the format of CIFAR's archive for Python, with 2 images a batch."""
    top = root / ("cifar-100-python" if hundred else "cifar-10-batches-py")
    top.mkdir(parents=True)
    batches = (
        ["train", "test"] if hundred else [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    )
    for number, name in enumerate(batches):
        data = np.full((2, 3072), number, np.uint8)
        data[:, 0] = 200 + number  # red of the first pixel: planes, not pixels, are in a row
        labels = {"fine_labels" if hundred else "labels": [number, 9]}
        (top / name).write_bytes(pickle.dumps({"data": data, **labels}))
    names = [f"class {i}" for i in range(100 if hundred else 10)]
    meta = {"fine_label_names" if hundred else "label_names": names}
    (top / ("meta" if hundred else "batches.meta")).write_bytes(pickle.dumps(meta))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_cifar_is_read_from_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None, name: str, channels: int
) -> None:
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    write_cifar(tmp_path, hundred=name == "cifar100")
    config = DataConfig(name=name, root=tmp_path)
    train, val = (open_dataset(config, split, channels) for split in ("train", "val"))
    assert len(train.classes) == (100 if name == "cifar100" else 10)
    assert train.classes[1] == "class 1"
    last = 1 if name == "cifar100" else 5  # number of the test batch
    assert (len(train), len(val)) == (2 * last, 2)
    assert [val[i][1] for i in range(2)] == [last, 9]
    image, _ = val[0]
    assert isinstance(image, Image.Image)
    expected = Image.new("RGB", (32, 32), (last, last, last))
    expected.putpixel((0, 0), (200 + last, last, last))
    assert image.tobytes() == expected.convert(PIL_MODES[channels]).tobytes()


def write_imagenette(top: Path) -> None:
    for split, count in (("train", 2), ("val", 1)):
        for label, wnid in enumerate(("n01440764", "n02102040", "n02979186")):
            for i in range(count):
                save(top / f"imagenette2/{split}/{wnid}/{wnid}_{i}.JPEG", 40 * label)


def test_imagenette_is_read_where_it_lies_and_not_downloaded_again(
    tmp_path: Path, offline: None
) -> None:
    write_imagenette(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    config = DataConfig(name="imagenette", root=tmp_path)
    train, val = open_dataset(config, "train"), open_dataset(config, "val")
    assert list(train.classes) == ["tench", "English springer", "cassette player"]
    assert values(val) == [(0, 0), (40, 1), (80, 2)]
    assert [label for _, label in values(train)] == [0, 0, 1, 1, 2, 2]
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "imagenette2/val/n01440764/n01440764_0.JPEG").write_bytes(b"noise")
    with pytest.raises(RunFailed, match="0 of imagenette"):
        val[0]


def test_processes_that_start_together_download_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    downloads = []

    def download(url: str, root: str, **_: object) -> None:
        downloads.append(url)
        print("downloading")
        write_imagenette(Path(root))

    monkeypatch.setattr("torchvision.datasets.imagenette.download_and_extract_archive", download)
    lengths: list[int] = []
    config = DataConfig(name="imagenette", root=tmp_path / "new")
    threads = [
        threading.Thread(target=lambda: lengths.append(len(open_dataset(config, "train"))))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lengths == [6, 6, 6]
    assert len(downloads) == 1
    assert [path.name for path in (tmp_path / "new").glob("[!.]*")] == ["imagenette2"]
    assert capfd.readouterr().out == ""  # which is kept for results


def test_an_interrupted_download_does_not_pass_for_the_whole_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(url: str, root: str, **_: object) -> None:
        save(Path(root) / "imagenette2/train/n01440764/0.JPEG")
        raise KeyboardInterrupt

    monkeypatch.setattr("torchvision.datasets.imagenette.download_and_extract_archive", download)
    config = DataConfig(name="imagenette", root=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        open_dataset(config, "train")
    assert list(tmp_path.glob("[!.]*")) == []


@pytest.mark.parametrize("name", sources.TORCHVISION)
def test_a_failed_download_is_told_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    sentence = refusal(DataConfig(name=name))
    assert f"the data set {name} is not in data/{name} and cannot be downloaded" in sentence
    assert "no network" in sentence
    elsewhere = DataConfig(name=name, root=tmp_path / "elsewhere", download=False)
    assert "data.download is off" in refusal(elsewhere)
    assert not (tmp_path / "elsewhere").exists()


# --- Hugging Face ---------------------------------------------------------------------------------

needs_datasets = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None,
    reason="the package datasets is not installed (extra hf)",
)


def test_hugging_face_without_its_extra_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "'.[hf]'" in refusal(DataConfig(name="hfds/cifar10"))


@pytest.fixture
def hugging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., DataConfig]:
    """Return a function that names a local folder as a Hugging Face data set."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)

    def name(folder: str, **splits: str) -> DataConfig:
        return DataConfig(f"hfds/{tmp_path / folder}", tmp_path / "cache", **splits)  # type: ignore[arg-type]

    return name


@needs_datasets
def test_a_local_hugging_face_set_gives_images_labels_and_classes(
    tmp_path: Path, hugging: Callable[..., DataConfig]
) -> None:
    for value, place in enumerate(("train/Cat", "train/Dog", "validation/Cat", "validation/Dog")):
        save(tmp_path / "Set" / place / "0.png", value)
    train, val = (open_dataset(hugging("Set"), split) for split in ("train", "val"))
    assert list(train.classes) == list(val.classes) == ["Cat", "Dog"]
    assert values(train) == [(0, 0), (1, 1)]
    assert values(val) == [(2, 0), (3, 1)]
    assert values(pickle.loads(pickle.dumps(val))) == values(val)
    image, _ = open_dataset(hugging("Set", val_split="train"), "val", 1)[1]
    assert np.asarray(image).tolist() == [[1] * 6] * 4


@needs_datasets
def test_a_hugging_face_set_without_labels_is_unlabelled(
    tmp_path: Path, hugging: Callable[..., DataConfig]
) -> None:
    for i in range(3):
        save(tmp_path / f"Flat/{i}.png", i)
    source = open_dataset(hugging("Flat"), "train")
    assert list(source.classes) == []
    assert values(source) == [(0, -1), (1, -1), (2, -1)]


@needs_datasets
def test_what_hugging_face_refuses_is_told_in_one_sentence(
    tmp_path: Path, hugging: Callable[..., DataConfig]
) -> None:
    save(tmp_path / "Set/train/Cat/0.png")
    (tmp_path / "Set/train/Cat/1.png").write_bytes(b"noise")
    assert "data.val_split val" in refusal(hugging("Set"), "val")
    assert "data.val_split other" in refusal(hugging("Set", val_split="other"), "val")
    assert "cannot be opened" in refusal(hugging("Missing"))
    (tmp_path / "text").mkdir()
    (tmp_path / "text/train.csv").write_text("a,b\n1,2\n")
    assert "no column image holds images; other columns: a, b" in refusal(hugging("text"))
    source = open_dataset(hugging("Set"), "train")
    with pytest.raises(RunFailed, match=r"1 of hfds/.*: it is neither a picture"):
        source[1]  # and not another sample in its place


@needs_datasets
def test_images_of_a_hugging_face_set_that_have_no_label_are_counted(
    tmp_path: Path, hugging: Callable[..., DataConfig]
) -> None:
    import datasets

    save(tmp_path / "0.png", 7)
    image = {"bytes": (tmp_path / "0.png").read_bytes(), "path": None}
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["Cat", "Dog"])}
    )
    rows = datasets.Dataset.from_dict({"image": [image] * 4, "label": [0, -1, None, 1]}, features)
    (tmp_path / "Set").mkdir()
    rows.to_parquet(tmp_path / "Set" / "train.parquet")
    source = open_dataset(hugging("Set"), "train")
    assert [label for _, label in values(source)] == [0, -1, -1, 1]
    assert count_unlabelled(source) == 2


# --- the embedded set, and names ------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_embedded_splits_are_disjoint_windows_in_any_mode(channels: int) -> None:
    config = DataConfig(synthetic_size=16, synthetic_train=12, synthetic_val=5)
    train, val = (open_dataset(config, split, channels) for split in ("train", "val"))
    longer = open_dataset(DataConfig(synthetic_size=16, synthetic_train=17), "train", channels)
    assert (len(train), len(val)) == (12, 5)
    assert tuple(train.classes) == tuple(CLASSES)
    for i in range(17):
        image, label = train[i] if i < 12 else val[i - 12]
        assert isinstance(image, Image.Image)
        assert image.mode == PIL_MODES[channels]
        assert label == i % 10
        assert image.tobytes() == longer[i][0].tobytes()  # type: ignore[union-attr]


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    sentence = refusal(DataConfig(name="imagenet"))
    for known in ("folder", "synthetic", *sources.TORCHVISION, "wds", "hfds/NAME"):
        assert known in sentence
    assert "data.synthetic_train" in refusal(DataConfig(synthetic_train=0))


def test_converting_leaves_the_given_image_alone() -> None:
    image = picture(3, "RGBA")
    assert to_channels(image, 1).mode == "L"
    assert image.mode == "RGBA"


def test_a_listing_is_kept_and_read_again_without_a_walk(tmp_path: Path, monkeypatch) -> None:
    for number in range(6):
        save(tmp_path / f"data/train/{'ab'[number % 2]}/{number}.png", number)
    config = DataConfig(root=tmp_path / "data", listing=tmp_path / "kept")
    first = values(open_dataset(config, "train"))
    (kept,) = (tmp_path / "kept").iterdir()
    monkeypatch.setattr(
        "mae_et.data.image_folder.image_names", lambda *_: pytest.fail("walked again")
    )
    assert values(open_dataset(config, "train")) == first
    assert len(first) == 6
    kept.write_bytes(kept.read_bytes()[:50])
    with pytest.raises(UserError, match=r"listing .* is damaged .*: delete it"):
        open_dataset(config, "train")


def test_classes_that_no_image_belongs_to_are_named(tmp_path: Path) -> None:
    for split, classes in (("train", "abc"), ("val", "ac")):
        for name in classes:
            save(tmp_path / split / name / "1.png", 1)
    config = DataConfig(root=tmp_path)
    assert classes_without_images(open_dataset(config, "train")) == []
    assert classes_without_images(open_dataset(config, "val")) == ["b"]
    assert classes_without_images(Synthetic(10, 16)) == []
