"""Features in files: equal to timm's and transformers', in order, and the same after a kill."""

import importlib.util
import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
import timm
import torch
from image_files import encoded, write_shard
from PIL import Image
from randomised import randomised
from safetensors.numpy import load_file
from safetensors.torch import save_file
from timm.models import save_for_hf

from finetune import EmbedConfig, embed
from finetune.embedding import resumable
from finetune.embedding.images import FeatureImages, open_parts
from finetune.embedding.rows import FeatureRows
from finetune.probing.features import encode_images
from finetune.probing.frozen_encoder import open_encoder
from mae_et import UserError
from mae_et.config.data import DataConfig
from mae_et.data.datasets import open_dataset
from mae_et.data.transforms import EvalDataset, normalise
from mae_et.errors import RunFailed
from mae_et.runtime import watchdog
from mae_et.runtime.watchdog import hang_watchdog
from mae_et.version import __version__

SMALL = {"depth": 3, "embed_dim": 48, "num_heads": 3, "img_size": 32, "patch_size": 8}
PAGE = Path(__file__).parents[2] / "docs" / "features.md"
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


@pytest.fixture(scope="module")
def network():
    return randomised(
        timm.create_model("vit_tiny_patch16_224", num_classes=0, global_pool="avg", **SMALL)
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory, network) -> Path:
    """A folder with `weights.safetensors`, and images in `data` (labelled) and `flat` (not)."""
    folder = tmp_path_factory.mktemp("embed")
    save_file(dict(network.state_dict()), folder / "weights.safetensors")
    colours = np.random.default_rng(0)
    for number in range(11):
        image = Image.fromarray(colours.integers(0, 255, (40, 48, 3), dtype=np.uint8))
        split, name = ("train", "val")[number % 3 == 2], ("cat", "dog")[number % 2]
        for file in (folder / "data" / split / name, folder / "flat"):
            file.mkdir(parents=True, exist_ok=True)
            image.save(file / f"{number:02}.png")
    return folder


def config(place: Path, output: Path, data: str = "data", **settings) -> EmbedConfig:
    section = DataConfig(root=place / data, mean=MEAN, std=STD, **settings.pop("section", {}))
    more = {"batch_size": 4, "num_workers": 0, "device": "cpu", "encoder_num_heads": 3} | settings
    return EmbedConfig(place / "weights.safetensors", data=section, output=output, **more)


def pixels_of(data: DataConfig, split: str, size: int = 32) -> torch.Tensor:
    view = EvalDataset(open_dataset(data, split), data, size)
    return normalise(torch.stack([image for image, _ in view]), MEAN, STD)


def read(path: Path) -> tuple[np.ndarray, pd.DataFrame]:
    """Read a file as a user would."""
    if path.suffix == ".parquet":
        table = pd.read_parquet(path)
        return np.stack(table["features"]), table
    table = pd.read_csv(path.with_suffix(".csv"))
    return (np.load(path) if path.suffix == ".npy" else load_file(path)["features"]), table


@pytest.mark.parametrize("file_type", [".npy", ".safetensors", ".parquet"])
def test_features_are_timm_s_in_the_order_of_the_listing(place, network, tmp_path, file_type):
    settings = config(place, tmp_path / f"features{file_type}")
    assert embed(settings)["shape"] == [11, 48]
    features, table = read(settings.output)
    pixels = torch.cat([pixels_of(settings.data, split) for split in ("train", "val")])
    with torch.no_grad():
        expected = network.forward_head(network.forward_features(pixels), pre_logits=True)
    np.testing.assert_allclose(features, expected, rtol=0, atol=1e-5)
    files = [
        path for split in ("train", "val") for path in sorted((place / "data" / split).rglob("*.*"))
    ]
    names = [path.relative_to(place / "data").as_posix() for path in files]
    assert table["name"].tolist() == names
    assert table["class"].tolist() == [name.split("/")[1] for name in names]
    assert table["label"].tolist() == [int(name == "dog") for name in table["class"]]
    assert table["split"].tolist() == [name.split("/")[0] for name in names]
    if file_type == ".safetensors":
        assert load_file(settings.output)["labels"].tolist() == table["label"].tolist()
    assert {path.suffix for path in tmp_path.iterdir()} <= {file_type, ".csv", ".json"}
    about = json.loads((tmp_path / "features.json").read_text())
    checkpoint = str((place / "weights.safetensors").resolve())
    assert (about["version"], about["checkpoint"]) == (__version__, checkpoint)
    assert about["image_size"] == [32, 32]
    assert len(about["weights"]) == 16


def test_features_are_those_of_transformers(place, tmp_path) -> None:
    import transformers

    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3,
             "intermediate_size": 96, "image_size": 32, "patch_size": 8}  # fmt: skip
    torch.manual_seed(1)
    theirs = transformers.ViTModel(transformers.ViTConfig(**sizes)).eval()
    theirs.save_pretrained(tmp_path / "hf")
    settings = config(place, tmp_path / "f.npy", "flat", pool="none", layers=(1, -1))
    settings = EmbedConfig(**{**vars(settings), "checkpoint": tmp_path / "hf"})
    embed(settings)
    data = DataConfig(root=place / "flat", mean=MEAN, std=STD, val_split=".")
    with torch.no_grad():
        found = theirs(pixels_of(data, "val"), output_hidden_states=True)
        first = theirs.layernorm(found.hidden_states[1])[:, 1:]
    expected = torch.cat([first, found.last_hidden_state[:, 1:]], dim=-1)
    np.testing.assert_allclose(np.load(settings.output), expected, rtol=0, atol=1e-5)
    table = pd.read_csv(tmp_path / "f.csv")
    assert table.columns.tolist() == ["name", "split"]
    assert table["name"].tolist() == [f"{number:02}.png" for number in range(11)]


def test_layers_and_sizes_are_those_of_timm(place, network, tmp_path) -> None:
    settings = config(place, tmp_path / "f.npy", split="val", pool="cls", layers=(2, 1))
    embed(settings)
    with torch.no_grad():
        found = network.forward_intermediates(
            pixels_of(settings.data, "val"), indices=[0, 1], return_prefix_tokens=True, norm=True,
            output_fmt="NLC", intermediates_only=True,
        )  # fmt: skip
    expected = torch.cat([found[1][1][:, 0], found[0][1][:, 0]], dim=-1)
    np.testing.assert_allclose(np.load(settings.output), expected, rtol=0, atol=1e-5)
    larger = config(place, tmp_path / "g.npy", split="val", image_size=48, dtype="float16")
    embed(larger)
    resized = timm.create_model("vit_tiny_patch16_224", num_classes=0, global_pool="avg", **SMALL)
    resized.load_state_dict(network.state_dict())
    resized.eval().set_input_size(img_size=48)
    with torch.no_grad():
        tokens = resized.forward_features(pixels_of(settings.data, "val", 48))
        expected = resized.forward_head(tokens, pre_logits=True)
    np.testing.assert_allclose(np.load(larger.output), expected, rtol=1e-3, atol=1e-3)
    assert np.load(larger.output).dtype == np.float16
    for wrong, said in (
        ({"layers": (4,)}, "layer 4: the encoder has blocks 1 to 3"),
        ({"image_size": 30}, "mult"),
    ):
        with pytest.raises(UserError, match=said):
            embed(config(place, tmp_path / "h.npy", **wrong))


@pytest.mark.parametrize("name", ["test_resnet", "swin_tiny_patch4_window7_224"])
def test_features_of_other_backbones_are_timm_s_before_the_head(place, tmp_path, name) -> None:
    narrow = {"embed_dim": 24, "depths": (1, 1, 1, 1), "img_size": 64} if "swin" in name else {}
    network = randomised(timm.create_model(name, num_classes=3, **narrow))
    save_for_hf(network, tmp_path / "net", safe_serialization=True)
    settings = replace(config(place, tmp_path / "f.npy", split="val"), image_size=64,
                       checkpoint=tmp_path / "net", encoder_num_heads=None)  # fmt: skip
    embed(settings)
    with torch.no_grad():
        maps = network.forward_features(pixels_of(settings.data, "val", 64))
        expected = network.forward_head(maps, pre_logits=True)
    np.testing.assert_allclose(np.load(settings.output), expected, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="pool cls needs a class token"):
        embed(replace(settings, output=tmp_path / "g.npy", pool="cls"))


@pytest.mark.parametrize("file_type", [".npy", ".safetensors", ".parquet"])
def test_a_killed_call_resumes_to_the_same_bytes(place, tmp_path, file_type, monkeypatch) -> None:
    monkeypatch.setattr(resumable, "SECONDS_BETWEEN_SAVES", 0.0)
    whole, broken = (config(place, tmp_path / kind / f"f{file_type}") for kind in "ab")
    embed(whole)
    append, calls, files = FeatureRows.append, [], set()

    def killed(self, *batch) -> None:
        calls.append(len(batch[1]))
        files.update(self.files)
        if len(calls) == 3:
            raise KeyboardInterrupt
        append(self, *batch)

    monkeypatch.setattr(FeatureRows, "append", killed)
    with pytest.raises(KeyboardInterrupt):
        embed(broken)
    assert files
    assert all(file.closed for file in files)
    partial = tmp_path / "b" / f"f{file_type}.partial"
    with (partial / "features").open("ab") as file:
        file.write(b"half a row")
    with pytest.raises(
        UserError, match=r"partial has other contents: pool was 'mean' and is now 'cls'"
    ):
        embed(EmbedConfig(**{**vars(broken), "pool": "cls"}))
    progress = partial / "progress.json"
    recorded = progress.read_text()
    for damaged in ("{}", recorded.replace('"rows": 8', '"rows": 4')):
        progress.write_text(damaged)
        with pytest.raises(UserError, match=r"progress\.json is damaged: it "):
            embed(broken)
    progress.write_text(recorded)
    embed(broken)
    assert calls == [4, 4, 3, 3]
    whole_files, resumed_files = (
        {path.name: path.read_bytes() for path in (tmp_path / kind).iterdir()} for kind in "ab"
    )
    assert resumed_files == whole_files
    assert len(whole_files) == (2 if file_type == ".parquet" else 3)


def test_other_features_are_not_overwritten(place, tmp_path, capsys) -> None:
    settings = config(place, tmp_path / "f.npy", split="val")
    embed(settings)
    before = settings.output.stat().st_mtime_ns
    embed(settings)
    assert "is complete already" in capsys.readouterr().err
    assert settings.output.stat().st_mtime_ns == before
    for key, value in (("dtype", "float16"), ("split", "train")):
        with pytest.raises(UserError, match=r"has other contents: (dtype|images) was"):
            embed(EmbedConfig(**{**vars(settings), key: value}))
    other = tmp_path / "other"  # images of the same names
    shutil.copytree(place / "data", other)
    Image.new("RGB", (40, 48)).save(other / "val" / "cat" / "02.png")
    data = replace(settings.data, root=other)
    with pytest.raises(UserError, match="has other contents: images was"):
        embed(replace(settings, data=data))
    settings.output.unlink()  # as the sentence says
    embed(EmbedConfig(**{**vars(settings), "dtype": "float16"}))
    (tmp_path / "f.json").unlink()
    with pytest.raises(UserError, match="mae-et did not write it"):
        embed(settings)
    (tmp_path / "mine.csv").write_text("annotations")
    with pytest.raises(UserError, match=r"mine.csv exists, and would be overwritten"):
        embed(config(place, tmp_path / "mine.safetensors"))


def test_unreadable_images_are_rows_of_nan(place, tmp_path, capsys) -> None:
    shutil.copytree(place / "flat", tmp_path / "flat")
    for number in (4, 5, 6, 7):  # a whole batch
        (tmp_path / "flat" / f"{number:02}.png").write_bytes(b"no image")
    (tmp_path / "weights.safetensors").symlink_to(place / "weights.safetensors")
    settings = config(tmp_path, tmp_path / "f.npy", "flat", section={"max_bad_fraction": 0.5})
    assert embed(settings)["unreadable"] == 4
    missing = np.isnan(np.load(settings.output)).any(1)
    assert missing.nonzero()[0].tolist() == [4, 5, 6, 7]
    said = capsys.readouterr().err
    folder = tmp_path / "flat"
    named = f"{folder}/04.png, {folder}/05.png, {folder}/06.png, ..."
    assert f"4 of 11 images cannot be read: their rows are NaN ({named}); " in said
    assert "04.png: it is neither an image nor an array" in said
    said = (
        r"0.01 allows.*: .*/04.png, .*/05.png, .*/06.png, .*/07.png; .*/04.png: it is neither .*; "
        r"to accept them, set data.max_bad_fraction 0.364"
    )
    with pytest.raises(RunFailed, match=said):
        embed(config(tmp_path, tmp_path / "g.npy", "flat"))
    with pytest.raises(RunFailed, match=r"cannot read the image .*04.png"):
        embed(config(tmp_path, tmp_path / "g.npy", "flat", section={"on_error": "stop"}))
    assert not (tmp_path / "g.npy.partial").exists()


def test_a_split_of_other_classes_is_encoded_without_labels(place, tmp_path, capsys) -> None:
    shutil.copytree(place / "data", tmp_path / "data")
    (tmp_path / "data/val/dog").rename(tmp_path / "data/val/Dog")
    train, val = open_parts(DataConfig(root=tmp_path / "data"), "all", 3)
    assert (len(train.source), len(val.source)) == (8, 3)
    assert " Dog, dog); its images are written without labels" in capsys.readouterr().err
    images = FeatureImages([train, val], DataConfig(), 32, 3)
    assert [images[i][1] for i in range(11)] == [train.source[i][1] for i in range(8)] + [-1] * 3
    assert all(name.startswith("val/") for name in val.names(DataConfig(root=tmp_path / "data")))


def test_names_of_tar_shards_are_those_of_their_files(place, tmp_path) -> None:
    files = {f"{'long/' * 30}{number}.png": encoded(number) for number in range(3)}
    write_shard(tmp_path / "a-train-0.tar", files)
    (tmp_path / "weights.safetensors").symlink_to(place / "weights.safetensors")
    settings = config(tmp_path, tmp_path / "f.npy", ".", section={"name": "wds"})
    embed(settings)
    names = pd.read_csv(tmp_path / "f.csv")["name"].tolist()
    assert names == [f"a-train-0.tar/{name}" for name in files]


@pytest.mark.parametrize("kind", ["npy", "parquet", "safetensors"])
def test_the_projector_shows_each_image_with_its_class(place, tmp_path, kind: str) -> None:
    settings = config(place, tmp_path / f"f.{kind}", projector=tmp_path / "cloud")
    assert embed(settings)["points"] == 11
    folder = tmp_path / "cloud" / "00000" / "default"
    rows = (folder / "metadata.tsv").read_text().splitlines()
    assert rows[:2] == ["name\tclass", "train/cat/00.png\tcat"]
    vectors = np.loadtxt(folder / "tensors.tsv")
    np.testing.assert_allclose(vectors, read(settings.output)[0], rtol=1e-5)
    assert Image.open(folder / "sprite.png").size == (4 * 32, 4 * 32)
    with pytest.raises(UserError, match="cannot be written to: File exists"):
        embed(config(place, tmp_path / "g.npy", projector=settings.output))
    assert not (tmp_path / "g.npy").exists()  # refused before the images are encoded


def test_parquet_without_pyarrow_is_refused(place, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the extra parquet"):
        embed(config(place, tmp_path / "f.parquet"))
    with pytest.raises(UserError, match=r"output must end in .npy, .parquet or .safetensors"):
        config(place, tmp_path / "f.csv")


def test_the_page_s_lines_read_the_files_back(place, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    embed(config(place, Path("features.npy"), "flat"))
    (lines,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict = {}
    exec(lines, names)
    assert len(names["features"]) == len(names["table"]) == 11
    assert names["similar"].argmax() == 0
    for file_type in ("parquet", "safetensors"):
        embed(config(place, Path(f"{file_type}.{file_type}"), "flat"))
    for code in re.findall(r"`(np.stack.*?|safetensors.*?)` \|", PAGE.read_text()):
        path = "parquet.parquet" if "parquet" in code else "safetensors.safetensors"
        found = eval(code, names | {"path": path, "safetensors": safetensors})
        np.testing.assert_array_equal(found, names["features"])


def test_watchdog_ends_a_process_that_encodes_no_batch(place, tmp_path, monkeypatch) -> None:
    """knn, linear-probe, embed, dynamics and preview --features encode images here."""
    ended: list[float] = []
    waits = False
    monkeypatch.setattr(watchdog._Watch, "end", lambda watch: ended.append(watch.seconds))

    class Slow(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            patience = time.monotonic() + (60 if waits else 0.4)
            while index and not ended and time.monotonic() < patience:
                time.sleep(0.01)
            return torch.zeros(3, 32, 32), index

    settings = config(place, tmp_path / "x.npy", batch_size=1, step_timeout=0.2)
    encoder = open_encoder(place / "weights.safetensors", 3)
    given = (encoder, Slow(), settings.data, settings, torch.device("cpu"))
    with hang_watchdog(60), encode_images(*given) as batches:
        assert len(list(batches)) == 2
    assert not ended  # the outer timeout holds
    waits = True

    def fail_in_the_middle() -> None:
        with encode_images(*given) as batches:
            next(batches)
            assert not ended
            next(batches)
            raise RunFailed("by the caller")

    with pytest.raises(RunFailed, match="by the caller"):
        fail_in_the_middle()
    assert ended[0] == 0.2
    assert watchdog._watch is None  # an error of the caller ends it too
