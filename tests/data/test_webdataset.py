"""WebDataset shards are indexed, labelled and read with random access."""

import gzip
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import encoded, npy, refusal, shards, values, write_shard

from mae_et.config.data import DataConfig
from mae_et.data.datasets import open_dataset
from mae_et.errors import RunFailed


def test_shards_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    write_shard(tmp_path / "1.tar", {"b.cls": b"1", "b.jpg": encoded(70, "JPEG")})
    write_shard(tmp_path / "0.tar", {"a.png": encoded(5), "a.cls": b"3\n", "c.png": encoded(6)})
    source = open_dataset(shards(tmp_path), "train")
    assert values(source) == [(5, 3), (6, -1), (70, 1)]
    assert source[-1][1] == 1
    assert list(source.classes) == ["0", "1", "2", "3"]


def test_a_key_ends_at_the_first_dot(tmp_path: Path) -> None:
    files = {
        "v1.0/a.png": encoded(1), "v1.0/a.cls": b"4", "a.png": encoded(2), "./a.cls": b"7",
        "v1.0/a.mask.png": encoded(3), "v1.0/b.c.png": encoded(4), "v1.0/b.cls": b"5",
        "c.JPG": encoded(5), "c.json": b"{}", "long/" + 120 * "n" + "/d.png": encoded(6),
    }  # fmt: skip
    write_shard(tmp_path / "0.tar", files)
    assert values(open_dataset(shards(tmp_path), "train")) == [(1, 4), (2, -1), (5, -1), (6, -1)]


def test_shards_may_hold_arrays(tmp_path: Path) -> None:
    array = np.arange(4 * 4 * 7, dtype=np.uint8).reshape(4, 4, 7)
    write_shard(tmp_path / "0.tar", {"a.npy": npy(array), "a.png": encoded(0)})
    image, _ = open_dataset(shards(tmp_path), "train", 7)[0]
    assert isinstance(image, torch.Tensor)
    assert torch.equal(image, torch.from_numpy(array).permute(2, 0, 1))


def test_a_splits_shards_are_in_its_folder_or_have_its_name(tmp_path: Path) -> None:
    for name in ("in/train/0.tar", "in/val/0.tar", "by/set-train-000.tar", "by/set-val-000.tar",
                 "by/set-retrieval-000.tar", "one/0.tar", "one/x_val_1.tar", "usual/Training/0.tar",
                 "usual/Validation/0.tar", "test/x-train-0.tar", "test/x-test-0.tar"):  # fmt: skip
        write_shard(tmp_path / name, {"a.png": encoded(len(name))})
    for root, train, val in (
        ("in", 14, 12), ("by", 20, 18), ("one", 9, 15), ("usual", 20, 22), ("test", 18, 17),
    ):  # fmt: skip
        assert values(open_dataset(shards(tmp_path / root), "train")) == [(train, -1)]
        assert values(open_dataset(shards(tmp_path / root), "val")) == [(val, -1)]
    other = shards(tmp_path / "by", val_split="retrieval")
    assert values(open_dataset(other, "val")) == [(24, -1)]


def test_shards_without_a_val_split_or_an_image_are_refused(tmp_path: Path) -> None:
    assert "no train shards" in refusal(shards(tmp_path))
    assert "is not a folder" in refusal(shards(tmp_path / "no"))
    assert "data.root is needed" in refusal(DataConfig(name="wds"))
    write_shard(tmp_path / "0.tar", {"a.txt": b"a caption", "a.cls": b"1"})
    assert "no val shards" in refusal(shards(tmp_path), "val")
    assert "1 file skipped (1 .txt)" in refusal(shards(tmp_path))
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


def test_an_unreadable_image_in_a_shard_is_located(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "0.tar", {"a.png": encoded(0), "b.png": b"noise"})
    source = open_dataset(shards(tmp_path), "train")
    with pytest.raises(RunFailed, match=rf"at byte 1536 of {path}: it is neither an image"):
        source[1]


# --- shards as others write them ------------------------------------------------------------------


def sample(key: str, value: int, **others: bytes) -> dict[str, bytes]:
    """Return the files of a sample: a PNG, and others by extension."""
    return {f"{key}.png": encoded(value)} | {f"{key}.{name}": each for name, each in others.items()}


def test_keys_with_dots_are_samples_of_their_own(tmp_path: Path) -> None:
    files = sample("IMG_1.1", 1, cls=b"0") | sample("IMG_1.2", 2, cls=b"1")
    files |= sample("a/v1.5_x", 3, cls=b"2") | sample("plain", 4, cls=b"3")
    write_shard(tmp_path / "0.tar", files)
    assert values(open_dataset(shards(tmp_path), "train")) == [(1, 0), (2, 1), (3, 2), (4, 3)]


def test_side_images_of_a_sample_are_counted_not_read(tmp_path: Path, capsys) -> None:
    files = sample("a", 1, cls=b"0") | {"a.mask.png": encoded(9), "a.depth.png": encoded(8)}
    write_shard(tmp_path / "0.tar", files | sample("b", 2, txt=b"a caption"))
    assert values(open_dataset(shards(tmp_path), "train")) == [(1, 0), (2, -1)]
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"mae-et: train split of {tmp_path}: 2 images in 1 shards; 1 without a label; "
        "3 files skipped (1 .depth.png, 1 .mask.png, 1 .txt)"
    )


def test_a_second_image_of_a_key_is_counted(tmp_path: Path, capsys) -> None:
    write_shard(tmp_path / "0.tar", sample("a", 1, cls=b"0") | {"a.jpg": encoded(70, "JPEG")})
    assert values(open_dataset(shards(tmp_path), "train")) == [(70, 0)]
    assert "1 file skipped (1 .png)" in capsys.readouterr().err  # the last one counts


@pytest.mark.parametrize(
    ("extension", "labels"),
    [
        ("cls", [b"cat", b"dog\n", b" cat "]),
        ("json", [b'{"label": "cat"}', b'{"class": "dog", "id": 7}', b'"cat"']),
        ("json", [b'{"class_name": "cat"}', b'{"label": "dog"}', b'{"target": "cat"}']),
    ],
)
def test_labels_may_be_names(tmp_path: Path, extension: str, labels: list[bytes]) -> None:
    files: dict[str, bytes] = {}
    for i, label in enumerate(labels):
        files |= sample(str(i), i, **{extension: label})
    write_shard(tmp_path / "0.tar", files)
    source = open_dataset(shards(tmp_path), "train")
    assert list(source.classes) == ["cat", "dog"]
    assert values(source) == [(0, 0), (1, 1), (2, 0)]


@pytest.mark.parametrize(
    ("content", "label"),
    [(b'{"label": 3}', 3), (b'{"cls": "2"}', 2), (b"1", 1), (b'{"caption": "a cat"}', -1),
     (b"{damaged", -1), (b'{"label": null}', -1), (b'{"label": null, "class_id": 4}', 4),
     (b'{"label": true}', -1), (b"[" * 9999, -1)],
)  # fmt: skip
def test_labels_are_read_from_json(tmp_path: Path, content: bytes, label: int) -> None:
    write_shard(tmp_path / "0.tar", sample("a", 5, json=content))
    assert values(open_dataset(shards(tmp_path), "train")) == [(5, label)]


def test_classes_without_images_are_reported(tmp_path: Path, capsys) -> None:
    """As of numbers that start at 1, or of 255 for images to ignore."""
    write_shard(tmp_path / "0.tar", sample("a", 1, cls=b"1") | sample("b", 2, cls=b"5"))
    assert len(open_dataset(shards(tmp_path), "train").classes) == 6
    assert "no image of 4 of 6 classes (0, 2, 3, ...)" in capsys.readouterr().err


def test_a_cls_file_precedes_json(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", sample("a", 5, json=b'{"label": 3}', cls=b"1"))
    assert values(open_dataset(shards(tmp_path), "train")) == [(5, 1)]


def test_val_names_are_numbered_as_in_train(tmp_path: Path) -> None:
    train = sample("a", 1, cls=b"ant") | sample("b", 2, cls=b"bee") | sample("c", 3, cls=b"cow")
    write_shard(tmp_path / "train/0.tar", train)
    write_shard(tmp_path / "val/0.tar", sample("c", 4, cls=b"cow"))
    val = open_dataset(shards(tmp_path), "val")
    assert list(val.classes) == ["ant", "bee", "cow"]
    assert values(val) == [(4, 2)]
    write_shard(tmp_path / "val/1.tar", sample("z", 4, cls=b"zebra"))
    assert "classes that the training split lacks: zebra" in refusal(shards(tmp_path), "val")
    write_shard(tmp_path / "val/1.tar", sample("a", 4, cls=b"1"))  # no number of a name in train
    assert "classes that the training split lacks: 1" in refusal(shards(tmp_path), "val")


@pytest.mark.parametrize("ending", [".tar.gz", ".tgz", ".tar.bz2", ".tar.zst"])
def test_compressed_shards_are_refused_by_name(tmp_path: Path, ending: str) -> None:
    for name in ("train/0", "set-train-0"):
        (tmp_path / "by" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "by" / f"{name}{ending}").write_bytes(b"")
    sentence = refusal(shards(tmp_path / "by"))
    assert f"0{ending}), which have no random access: decompress them to .tar" in sentence


def test_compressed_shards_beside_others_are_counted(tmp_path: Path, capsys) -> None:
    write_shard(tmp_path / "train/0.tar", sample("a", 1, cls=b"0"))
    for name in ("1.tar.gz", "2.tgz"):
        (tmp_path / "train" / name).write_bytes(b"")
    assert len(open_dataset(shards(tmp_path), "train")) == 1
    assert "1 images in 1 shards; 2 compressed shards skipped (1.tar.gz, ...)" in (
        capsys.readouterr().err
    )


def test_test_shards_are_never_for_training(tmp_path: Path) -> None:
    for name, value in (("x-0", 1), ("x-val-0", 2), ("x-test-0", 3)):
        write_shard(tmp_path / f"{name}.tar", sample("a", value))
    assert values(open_dataset(shards(tmp_path), "train")) == [(1, -1)]
    assert values(open_dataset(shards(tmp_path), "val")) == [(2, -1)]


def test_a_missing_end_marker_is_warned_of(tmp_path: Path) -> None:
    """A copy that was cut between two members reads as a whole archive."""
    path = write_shard(tmp_path / "0.tar", sample("a", 1, cls=b"0") | sample("b", 2, cls=b"1"))
    with tarfile.open(path) as archive:
        third = archive.getmembers()[2].offset
    path.write_bytes(path.read_bytes()[:third])
    with pytest.warns(UserWarning, match=rf"{path} has no end marker: it may have been cut"):
        source = open_dataset(shards(tmp_path), "train")
    assert values(source) == [(1, 0)]


def test_shards_are_found_in_folders_below_and_in_capitals(tmp_path: Path) -> None:
    for value, name in enumerate(("0.tar", "1.TAR", "part/2.tar")):
        write_shard(tmp_path / "train" / name, sample("a", value))
    (tmp_path / "train/._0.tar").write_bytes(b"of macOS")
    assert values(open_dataset(shards(tmp_path), "train")) == [(0, -1), (1, -1), (2, -1)]


def test_shards_that_name_no_split_are_counted(tmp_path: Path, capsys) -> None:
    for value, name in enumerate(("x-train-0", "x-val-0", "x-test-0", "more-0")):
        write_shard(tmp_path / f"{name}.tar", sample("a", value))
    assert values(open_dataset(shards(tmp_path), "train")) == [(0, -1)]
    line = f"shards in {tmp_path} that name no split are not read: 1 (more-0.tar)"
    assert line in capsys.readouterr().err


def test_archives_joined_with_cat_are_refused(tmp_path: Path) -> None:
    """Reading would stop at the first archive's end marker."""
    path = write_shard(tmp_path / "0.tar", sample("a", 1, cls=b"0"))
    path.write_bytes(path.read_bytes() * 2)
    assert "another archive follows its end marker" in refusal(shards(tmp_path))


def test_hidden_files_and_links_in_a_shard_are_counted_not_read(tmp_path: Path, capsys) -> None:
    files = sample("a", 1, cls=b"0") | {"._a.png": b"of macOS", "__MACOSX/._a.cls": b"x"}
    path = write_shard(tmp_path / "0.tar", files | sample("./b", 2, cls=b"1"))
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("c.png")
        link.type, link.linkname = tarfile.LNKTYPE, "a.png"
        archive.addfile(link)
    assert values(open_dataset(shards(tmp_path), "train")) == [(1, 0), (2, 1)]
    assert "3 files skipped (2 hidden, 1 .png (links))" in capsys.readouterr().err


def test_label_files_without_a_label_are_counted(tmp_path: Path, capsys) -> None:
    files = sample("a", 1, json=b'{"label": 2.0}') | sample("b", 2, json=b'{"label": [1, 0]}')
    files |= sample("c", 3, json=b'{"caption": "c"}', cls=b"\xef\xbb\xbf1")
    write_shard(tmp_path / "0.tar", files)
    assert values(open_dataset(shards(tmp_path), "train")) == [(1, 2), (2, -1), (3, 1)]
    assert "1 file skipped (1 .json (no label in it))" in capsys.readouterr().err


def test_a_shard_of_two_splits_is_refused(tmp_path: Path) -> None:
    """A folder of images in a tar is no shard: validation images would be trained on."""
    write_shard(tmp_path / "0.tar", {"./train/a/0.png": encoded(0), "./val/a/1.png": encoded(1)})
    assert "0.tar has the splits train and val in it: unpack it" in refusal(shards(tmp_path))
    write_shard(tmp_path / "0.tar", {"train/a/0.png": encoded(0), "train/b/1.png": encoded(1)})
    assert len(open_dataset(shards(tmp_path), "train")) == 2
