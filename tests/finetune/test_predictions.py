"""Predicted classes in a table: those of the network, in order, and the same after a kill."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from randomised import randomised
from timm.models import save_for_hf

from finetune import PredictConfig, predict
from finetune.embedding import resumable
from finetune.embedding.rows import FeatureRows
from mae_et import UserError
from mae_et.config.data import DataConfig
from mae_et.data.datasets import open_dataset
from mae_et.data.transforms import EvalDataset, normalise

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
NAMES = ["ant", "bee", "=cow"]


@pytest.fixture(scope="module")
def network():
    return randomised(timm.create_model("test_resnet", num_classes=3))


@pytest.fixture(scope="module")
def place(tmp_path_factory, network) -> Path:
    """A folder with a classifier `net` of a ConvNet, and images in `flat`."""
    folder = tmp_path_factory.mktemp("predict")
    save_for_hf(network, folder / "net", model_config={"label_names": NAMES},
                safe_serialization=True)  # fmt: skip
    (folder / "flat").mkdir()
    colours = np.random.default_rng(0)
    for number in range(11):
        image = Image.fromarray(colours.integers(0, 255, (40, 48, 3), dtype=np.uint8))
        image.save(folder / "flat" / f"{number:02}.png")
    return folder


def config(place: Path, output: Path, images: str = "flat", **settings) -> PredictConfig:
    data = DataConfig(root=place / images, mean=MEAN, std=STD, **settings.pop("section", {}))
    more = {"batch_size": 4, "num_workers": 0, "device": "cpu", "image_size": 32} | settings
    return PredictConfig(place / "net", data=data, output=output, **more)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_classes_and_probabilities_are_the_network_s(place, network, tmp_path) -> None:
    settings = config(place, tmp_path / "p.csv", top_k=2)
    assert predict(settings) == {"predictions": str(settings.output), "images": 11, "unreadable": 0}
    data = DataConfig(root=place / "flat", mean=MEAN, std=STD, val_split=".")
    view = EvalDataset(open_dataset(data, "val"), data, 32)
    pixels = normalise(torch.stack([image for image, _ in view]), MEAN, STD)
    with torch.no_grad():
        expected = network(pixels).softmax(1).topk(2)
    rows = read(settings.output)
    assert list(rows[0]) == ["name", "split", "class", "probability", "class_2", "probability_2"]
    assert [row["name"] for row in rows] == [f"{number:02}.png" for number in range(11)]
    for row, values, indices in zip(rows, expected.values, expected.indices, strict=True):
        names = [NAMES[index].replace("=", "'=") for index in indices]
        assert [row["class"], row["class_2"]] == names
        found = [float(row[key]) for key in ("probability", "probability_2")]
        assert found == pytest.approx(values.tolist(), abs=1e-4)
    with pytest.raises(UserError, match="has other contents: top_k was 2 and is now 3"):
        predict(config(place, tmp_path / "p.csv"))  # all three: the default is five
    with pytest.raises(UserError, match=r"output must end in .csv"):
        config(place, tmp_path / "p.npy")


def test_a_killed_call_resumes_to_the_same_bytes(place, tmp_path, monkeypatch) -> None:
    """Also beside images that cannot be read."""
    monkeypatch.setattr(resumable, "SECONDS_BETWEEN_SAVES", 0.0)
    shutil.copytree(place / "flat", tmp_path / "flat")
    shutil.copytree(place / "net", tmp_path / "net")
    (tmp_path / "flat" / "05.png").write_bytes(b"no image")
    whole, broken = (config(tmp_path, tmp_path / kind / "p.csv") for kind in "ab")
    assert predict(whole)["unreadable"] == 1
    rows = read(whole.output)
    assert list(rows[5].values()) == ["05.png", "all", *[""] * 6]
    assert all(all(row.values()) for row in rows[:5] + rows[6:])
    append, calls = FeatureRows.append, []

    def killed(self, *batch) -> None:
        calls.append(len(batch[1]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        append(self, *batch)

    monkeypatch.setattr(FeatureRows, "append", killed)
    with pytest.raises(KeyboardInterrupt):
        predict(broken)
    assert not broken.output.exists()
    predict(broken)
    assert calls == [4, 4, 3, 3]
    ours, theirs = (
        {path.name: path.read_bytes() for path in (tmp_path / kind).iterdir()} for kind in "ab"
    )
    assert ours == theirs
    assert set(ours) == {"p.csv", "p.json"}
