"""`mae-et demo` trains, probes, and ends with one line of figures."""

import json

import pytest
from PIL import Image

from mae_et import load_config
from mae_et.cli.main import main
from mae_et.config.schema import PretrainConfig
from mae_et.data.sources.synthetic import render


def last_json(text: str) -> dict:
    return json.loads(text.strip().splitlines()[-1])


def test_the_demo_ends_with_one_line_of_figures(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--data.synthetic_train=80", "--data.synthetic_val=30", "--curriculum.epochs=2"]
    assert main(["demo", *flags, "--optim.batch_size=8", "--efficiency.num_workers=0"]) == 0
    results = last_json(capsys.readouterr().out)
    assert results["run"] == "runs/demo"
    for name in ("loss", "knn", "linear", "untrained_knn", "untrained_linear", "compute"):
        assert results[name] > 0
    assert [stage["bandwidth"] for stage in results["stages"]] == [32] * 2 + [48] * 4 + [64] * 4
    assert all(stage["images_per_second"] > 0 for stage in results["stages"])
    assert (results["probes"][0]["compute"], results["probes"][-1]["compute"]) == (0, 1)


@pytest.mark.parametrize("labelled", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_demo_on_own_images_writes_to_a_folder_of_its_own(
    tmp_path, capsys, monkeypatch, labelled: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(40):
        image, label = render(number, 40)
        path = tmp_path / "photos" / (f"class{label}" if labelled else ".") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    flags = ["--data.root=photos", "--efficiency.num_workers=0"]
    assert main(["demo", *flags]) == 0
    shown = capsys.readouterr()
    images = 30 if labelled else 32
    assert f"optim.batch_size {images}, all training images, not 64" in shown.err
    assert main(["demo", *flags]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0].endswith(": demo in runs/demo-photos")
    assert "start   finished before" in said
    results = last_json(shown.out)
    assert results["run"] == "runs/demo-photos"
    assert ("linear" in results) == labelled
    assert ("scoring an encoder needs labelled images" in shown.err) != labelled


@pytest.mark.slow
def test_the_demo_s_trained_encoder_is_clearly_above_the_untrained_one(
    tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 0
    results = last_json(capsys.readouterr().out)
    assert results["linear"] > results["untrained_linear"] + 12
    assert results["knn"] > results["untrained_knn"] + 6


def test_the_demo_s_config_is_the_headline_recipe_at_a_small_size() -> None:
    config = load_config(PretrainConfig, ["demo"])
    assert (config.curriculum.preset, config.model.target) == ("etpp", "hog")
    assert config.data.source == "synthetic"
