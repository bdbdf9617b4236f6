"""Statistics, evaluation view and base size travel with the weights."""

import json
import math
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny_run import GOLDEN
from tiny_run import TINY as TINY_YAML

from finetune import ClassifierConfig, ProbeConfig, classify, knn
from finetune.config import NetworkConfig
from finetune.training.model import build_classifier
from finetune.training.preprocessing import preprocessing_of_start
from mae_et import PretrainConfig, UserError, export, load_config, pretrain
from mae_et.checkpoints.formats import load_weights
from mae_et.checkpoints.preprocessing import Preprocessing, report_preprocessing
from mae_et.checkpoints.source import recognise
from mae_et.checkpoints.store import list_checkpoints
from mae_et.checkpoints.writers.tensor_files import export_encoder
from mae_et.cli.arguments import parse_over_data
from mae_et.cli.commands import COMMANDS, config_of
from mae_et.cli.main import main
from mae_et.config.data import DataConfig
from mae_et.config.files import to_yaml
from mae_et.config.model import ModelConfig
from mae_et.io.seals import seal
from mae_et.models.mae import MaskedAutoencoder

TINY = GOLDEN / "mae_tiny_released_format.pth"
OWN = Preprocessing((0.5, 0.4, 0.3), (0.25, 0.2, 0.3), 1.0, 32)
FLAGS = ("--data.mean=[0.5,0.4,0.3]", "--data.std=[0.25,0.2,0.3]", "--data.eval_crop=1.0",
         "--output.tensorboard=false")  # fmt: skip
ELSEWHERE = ["--data.name=synthetic", "--data.synthetic_train=32", "--data.synthetic_val=20"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Folder of a short run with statistics of its own, which tests only read."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "tiny.yaml").write_text(TINY_YAML)
    flags = [f"--output.dir={folder / 'run'}", "--curriculum.epochs=1.2", *FLAGS]
    return pretrain(load_config(PretrainConfig, [folder / "tiny.yaml"], flags))


def test_every_form_of_a_run_records_its_preprocessing(run: Path, tmp_path: Path) -> None:
    forms = [run, list_checkpoints(run / "checkpoints")[-1], run / "encoder.safetensors"]
    forms += [export(run, kind, tmp_path / kind) for kind in ("timm", "mae", "hf")]
    forms.append(export(run, "timm", tmp_path / "folder" / "model.safetensors").parent)
    for path in forms:
        assert load_weights(path).preprocessing == OWN, path
        assert recognise(path).preprocessing() == OWN, path
        data = recognise(path).data()
        assert data is not None
        assert (data.mean, data.std, data.eval_crop) == (OWN.mean, OWN.std, 1.0)
    assert recognise(TINY).preprocessing() is None


@pytest.mark.parametrize("form", ["run", "encoder", "mae", "hf"])
def test_fine_tuning_on_other_data_inherits_it(form: str, run: Path, tmp_path: Path) -> None:
    path = {"run": run, "encoder": run / "encoder.safetensors"}.get(form)
    path = path or export(run, form, tmp_path / form)  # type: ignore[arg-type]
    words = [f"--checkpoint={path}", *ELSEWHERE]
    config = config_of("finetune", words)
    assert (config.data.mean, config.data.std, config.data.eval_crop) == (OWN.mean, OWN.std, 1.0)
    assert (config.model.image_size, config.data.synthetic_train) == (32, 32)
    config = config_of("finetune", [*words, "--data.mean=[0.1]", "--data.std=[0.2]"])
    assert (config.data.mean, config.data.eval_crop) == ((0.1,), 1.0)


@pytest.mark.parametrize(
    ("command", "form"),
    [("knn", "run"), ("knn", "timm"), ("knn", "mae"), ("linear-probe", "run")],
)
def test_probes_of_other_data_inherit_it(command, form, run, tmp_path, capsys) -> None:
    path = run if form == "run" else export(run, form, tmp_path / form)
    words = [command, f"--checkpoint={path}", *ELSEWHERE, "--num_workers=0", "--device=cpu"]
    words += ["--epochs=1"] * (command == "linear-probe")
    assert main(words) == 0
    assert "images are prepared with" not in capsys.readouterr().err
    assert main([*words, "--data.mean=[0.1,0.1,0.1]"]) == 0
    line = "images are prepared with data.mean [0.1, 0.1, 0.1] (the checkpoint has [0.5, 0.4, 0.3])"
    assert line in capsys.readouterr().err


def test_the_library_reports_what_a_config_does_differently(run: Path, capsys) -> None:
    data = DataConfig(name="synthetic", synthetic_train=32, synthetic_val=20)
    knn(ProbeConfig(run, data=data, num_workers=0, device="cpu"))
    stderr = capsys.readouterr().err
    for part in ("data.mean [0.485, ", "data.std [0.229, ", "data.eval_crop 0.875 (the checkpoint"):
        assert part in stderr
    assert stderr.count("images are prepared") == 1


def test_a_classifier_hands_it_on(run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run, tmp_path / "run"))
    words = [f"--checkpoint={run}", *ELSEWHERE, "--curriculum.epochs=1", "--optim.batch_size=8",
             f"--output.dir={tmp_path / 'tuned'}", "--efficiency.num_workers=0",
             "--efficiency.device=cpu", "--output.tensorboard=false"]  # fmt: skip
    config = config_of("finetune", words)
    classify(config)
    exported = export(tmp_path / "tuned", "mae", tmp_path / "tuned.pth")
    for path in (tmp_path / "tuned", exported):
        assert load_weights(path).preprocessing == OWN
    # It resumes, or is found finished, where its start is gone.
    run.rename(tmp_path / "moved")
    again = config_of("finetune", words)
    assert again == config


def test_backbones_inherit_what_timm_publishes() -> None:
    name = "vit_base_patch16_clip_224.openai"
    published = timm.get_pretrained_cfg(name)
    found = preprocessing_of_start(NetworkConfig(backbone=name, pretrained=True))
    assert found == Preprocessing(published.mean, published.std, published.crop_pct, 224, "bicubic")
    assert preprocessing_of_start(NetworkConfig(backbone=name)) is None
    config = config_of("finetune", [f"--model.backbone={name}", "--model.pretrained=true"])
    assert config.data.mean == published.mean
    assert recognise(Path(name)).preprocessing() == found


@pytest.mark.parametrize("form", ["encoder", "mae", "hf"])
def test_channels_are_inherited_with_their_statistics(form: str, tmp_path: Path) -> None:
    """A grey encoder's one number fits no three channels, nor ImageNet's three one channel."""
    sizes = {"image_size": 16, "patch_size": 8, "encoder_embed_dim": 16, "encoder_depth": 1,
             "encoder_num_heads": 1, "decoder_embed_dim": 16, "decoder_depth": 1,
             "decoder_num_heads": 1}  # fmt: skip
    model = ModelConfig("vit_tiny_patch16_224", channels=1, **sizes)
    grey = Preprocessing((0.5,), (0.25,), 1.0, 16)
    path = tmp_path / "encoder.safetensors"
    network = MaskedAutoencoder.from_config(model)
    export_encoder(network.encoder, path, model, grey)
    if form != "encoder":
        path = export(path, form, tmp_path / form)  # type: ignore[arg-type]
    heads = ["--model.encoder_num_heads=1"] if form == "mae" else []
    for given in ([], ["--model.channels=1"]):
        words = [f"--checkpoint={path}", *ELSEWHERE, *given, *heads]
        config = config_of("finetune", words)
        assert (config.model.channels, config.data.mean, config.data.std) == (1, (0.5,), (0.25,))
    words = [f"--init={path}", *ELSEWHERE, "--model.channels=1"]
    assert config_of("pretrain", words).data.mean == (0.5,)
    with pytest.raises(UserError, match=r"data\.mean has 3 numbers"):
        config_of("pretrain", words[1:])
    with pytest.raises(UserError, match=r"model\.channels 3: the encoder of .* has 1"):
        build_classifier(NetworkConfig(path, channels=3), 2)


OF_IMAGENET = (DataConfig().mean, DataConfig().std, 0.875, 224)


@pytest.mark.parametrize(
    ("recorded", "line"),
    [
        (Preprocessing(*OF_IMAGENET), ""),
        (Preprocessing(*OF_IMAGENET, "bilinear"), "bicubic interpolation (the checkpoint"),
        (Preprocessing((0.5,), OF_IMAGENET[1]), "data.mean [0.485, 0.456, 0.406] (the checkpoint"),
        (
            None,
            "a.pth records no statistics of its images, which are normalised with data.mean [0.",
        ),
    ],
)
def test_what_differs_from_the_record_is_reported(recorded, line: str, capsys) -> None:
    report_preprocessing(recorded, DataConfig(), "a.pth")
    said = capsys.readouterr().err
    assert line in said
    assert bool(said) is bool(line)
    report_preprocessing(
        Preprocessing((0.5,), (0.5,)), DataConfig(mean=(0.5,) * 3, std=(0.5,) * 3), ""
    )
    assert not capsys.readouterr().err  # one number stands for all channels


def test_a_damaged_record_is_refused_in_one_sentence(tmp_path: Path, run: Path) -> None:
    weights = torch.load(export(run, "mae", tmp_path / "a.pth"), weights_only=True)
    for text in ("[]", "{}", '{"mean": "x"}', json.dumps({"mean": [0], "std": [0]})):
        torch.save(weights | {"mae_et.preprocessing": text}, tmp_path / "b.pth")
        with pytest.raises(UserError, match=r"b\.pth is damaged: mae_et\.preprocessing"):
            load_weights(tmp_path / "b.pth")


def test_a_backbone_inherits_what_timm_records(tmp_path: Path) -> None:
    published = {"mean": [0.5], "std": [0.25], "crop_pct": 0.9, "input_size": [3, 64, 96]}
    about = {"architecture": "test_resnet", "pretrained_cfg": published}
    (tmp_path / "config.json").write_text(json.dumps(about))
    (tmp_path / "model.safetensors").touch()
    flags = [f"--checkpoint={tmp_path}", "--model.backbone=test_resnet", *ELSEWHERE]
    config = config_of("finetune", flags)
    assert config.model.image_size == (64, 96)
    assert (config.data.mean, config.data.std, config.data.eval_crop) == ((0.5,), (0.25,), 0.9)


def test_a_hub_s_backbone_inherits_its_config_which_a_resumed_run_keeps(tmp_path: Path) -> None:
    published = {"mean": [0.5], "std": [0.25], "input_size": [3, 64, 64]}
    about = {"architecture": "test_resnet", "pretrained_cfg": published}
    (tmp_path / "config.json").write_text(json.dumps(about))
    flags = [f"--model.backbone=local-dir:{tmp_path}", "--model.pretrained=true", *ELSEWHERE]
    config = config_of("supervised", [*flags, f"--output.dir={tmp_path}"])
    assert (config.model.image_size, config.data.mean) == (64, (0.5,))
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert config_of("supervised", [*flags, f"--output.dir={tmp_path}"]) == config
    assert config_of("supervised", flags).data.mean == DataConfig.mean


def test_recipes_keep_their_own_sizes(run: Path) -> None:
    config = load_config(ClassifierConfig, ["finetune/vit_b16"], [f"--model.checkpoint={run}"])
    parsed = config_of("finetune", ["--config=finetune/vit_b16", f"--checkpoint={run}", *ELSEWHERE])
    assert parsed.model.image_size == config.model.image_size == 224


@pytest.mark.parametrize(
    ("about", "mean", "std", "mode"),
    [
        ({"image_mean": [0.5], "image_std": [0.25]}, (0.5,), (0.25,), "center"),
        ({"do_normalize": False, "image_mean": [0.5], "image_std": [0.5]}, (0,), (1,), "center"),
        ({"do_normalize": False, "do_rescale": False}, (0,), (1 / 255,), "center"),
        ({"do_rescale": False, "image_mean": [127.5], "image_std": [51]}, (0.5,), (0.2,), "center"),
        ({"rescale_factor": 2 / 255, "image_mean": [1], "image_std": [1]}, (0.5,), (0.5,), "center"),  # noqa: E501
        ({"image_mean": [0.5], "image_std": [0.5], "size": {"height": 32, "width": 32}},
         (0.5,), (0.5,), "squash"),
        ({"image_mean": [0.5], "image_std": [0.5], "size": 32}, (0.5,), (0.5,), "squash"),
        ({"image_mean": [0.5], "image_std": [0.5], "size": 40, "crop_size": 32,
          "do_center_crop": True, "feature_extractor_type": "DeiTFeatureExtractor"},
         (0.5,), (0.5,), "squash"),
        ({"image_mean": [0.5], "image_std": [0.5], "size": 32,
          "feature_extractor_type": "CLIPFeatureExtractor"}, (0.5,), (0.5,), "center"),
        ({"image_mean": [0.5], "image_std": [0.5], "size": {"shortest_edge": 32},
          "do_resize": False}, (0.5,), (0.5,), "no resizing"),
    ],
)  # fmt: skip
def test_what_a_hugging_face_processor_does_is_read(about, mean, std, mode, capsys) -> None:
    found = Preprocessing.of_hugging_face(about, "folder")
    assert found is not None
    assert (found.mean, found.std, found.crop_mode) == (
        pytest.approx(mean), pytest.approx(std), mode
    )  # fmt: skip
    data = DataConfig(mean=found.mean, std=found.std, eval_crop=1.0)
    report_preprocessing(found, data, "a.pth")
    assert (f"crop mode {mode}" in capsys.readouterr().err) == (mode != "center")


def test_the_share_of_a_centre_crop_is_read_or_timm_s_default() -> None:
    about = {"image_mean": [0.5], "image_std": [0.5], "size": {"shortest_edge": 32}}
    convnext = Preprocessing.of_hugging_face(about | {"crop_pct": 0.8}, "folder")
    timm_s = Preprocessing.of_timm({"mean": [0.5], "std": [0.5], "input_size": [3, 32, 32]})
    assert (convnext.eval_crop, timm_s.eval_crop) == (0.8, 0.875)
    unsized = Preprocessing.of_timm({"mean": [0.5], "std": [0.5]})
    assert unsized is not None
    assert unsized.image_size == 224
    for entry in ({"std": "x"}, {"std": [1], "input_size": [3, math.inf, 32]}):
        with pytest.raises(UserError, match=r"config\.json is damaged"):
            Preprocessing.of_timm({"mean": [0.5]} | entry, "config.json")
    for entry in ({"rescale_factor": 0}, {"size": {"shortest_edge": 0}, "do_center_crop": True}):
        entry |= {"image_mean": [0.5], "image_std": [0.5], "crop_size": 32}
        with pytest.raises(UserError, match=r"config\.json is damaged"):
            Preprocessing.of_hugging_face(entry, "preprocessor_config.json")


def test_a_folder_takes_the_place_of_a_run_s_synthetic_images(tiny, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(tiny("--data.name=synthetic")))
    config = parse_over_data(COMMANDS["knn"], [str(tmp_path), f"--data.root={tmp_path}"])
    assert (config.data.source, config.data.root) == ("folder", tmp_path)


def test_a_recipe_of_folders_is_run_on_the_folder_of_its_checkpoint(tiny, tmp_path: Path) -> None:
    words = ["--config=finetune/vit_b16", f"--checkpoint={tmp_path}"]
    for kind, root in (("folder", tmp_path / "images"), ("shards", None)):
        config = tiny(f"--data.name={kind}", f"--data.root={tmp_path / 'images'}")
        (tmp_path / "config.yaml").write_text(to_yaml(config))
        assert config_of("finetune", words).data.root == root


@pytest.mark.parametrize("command", ["knn", "dynamics"])
def test_a_named_architecture_brings_what_timm_publishes(command: str, tmp_path, capsys) -> None:
    """A file that only timm can read records no statistics of its own."""
    name = "vit_base_patch16_clip_224.openai"
    words = [f"--checkpoint={tmp_path / 'clip.pth'}", f"--architecture={name}"]
    words.append("--data.name=synthetic")
    config = parse_over_data(COMMANDS[command], words)
    assert config.data.mean == timm.get_pretrained_cfg(name).mean
    assert f"images as timm records for {name}" in capsys.readouterr().err
    config = parse_over_data(COMMANDS[command], [*words, "--data.mean=[0.1,0.1,0.1]"])
    assert config.data.mean == (0.1, 0.1, 0.1)


def test_the_config_that_timm_saves_beside_its_file_counts(tmp_path: Path) -> None:
    about = {"architecture": "resnet10t", "pretrained_cfg": {
        "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "crop_pct": 0.9, "input_size": [3, 64, 64],
    }}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(about))
    (tmp_path / "model.safetensors").touch()
    found = recognise(tmp_path / "model.safetensors", architecture="resnet10t").preprocessing()
    assert found == Preprocessing((0.1, 0.2, 0.3), (0.5,) * 3, 0.9, 64)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    start = NetworkConfig(backbone="resnet10t", checkpoint=tmp_path / "model.safetensors")
    assert preprocessing_of_start(start) == found
    shutil.copy(TINY, tmp_path / "vit.pth")
    assert load_weights(tmp_path / "vit.pth").preprocessing == found


def test_a_named_architecture_keeps_the_statistics_of_a_folder_of_transformers(
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    about = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5], "size": 64}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(about))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    name = "vit_tiny_patch16_224"
    for path in (tmp_path, tmp_path / "model.safetensors"):
        found = recognise(path, architecture=name).preprocessing()
        assert found is not None
        assert (found.mean, found.image_size) == ((0.1, 0.2, 0.3), 64)
        assert preprocessing_of_start(NetworkConfig(backbone=name, checkpoint=path)) == found


def test_a_backbone_s_run_hands_on_its_statistics(tmp_path: Path) -> None:
    about = {"classes": ["a", "b"], "preprocessing": vars(OWN)}
    (tmp_path / "classes.json").write_text(json.dumps(seal(about)))
    words = ["--model.backbone=resnet10t", "--data.name=synthetic"]
    config = config_of("finetune", [*words, f"--checkpoint={tmp_path}"])
    assert (config.data.mean, config.data.eval_crop) == (OWN.mean, OWN.eval_crop)
    assert config_of("finetune", words).data.mean == DataConfig().mean
