"""Exports as users of transformers open them."""

import json
from pathlib import Path

import pytest
import torch
from classifiers import vit_of
from natural_images import natural
from safetensors.torch import save_file
from tiny_run import GOLDEN

from finetune import EvaluateConfig
from finetune.evaluation.trained_classifier import load_classifier
from mae_et import export, load_pretrained, mask_from_noise, pretrain
from mae_et.checkpoints.formats import load_weights
from mae_et.config.data import DataConfig, resized_side
from mae_et.data.transforms import EvalDataset, normalise
from mae_et.io.seals import seal

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

TINY = GOLDEN / "mae_tiny_released_format.pth"
QUICK = ("--output.tensorboard=false",)
STATISTICS = ("--data.mean=[0.5,0.4,0.3]", "--data.std=[0.25,0.2,0.3]")


class OneImage(list):
    """A data set of one image."""

    def __getitem__(self, index):
        return super().__getitem__(index), 0


def test_a_run_keeps_its_mask_ratio_target_and_statistics(tiny, tmp_path: Path) -> None:
    flags = (*QUICK, *STATISTICS, "--model.mask_ratio=0.6", "--data.eval_crop=0.8")
    start = "random"
    for target in ("pixel", "norm_pix"):
        init = [] if start == "random" else [f"--init.weights={tmp_path / start}"]
        run = pretrain(
            tiny(*flags, *init, f"--model.target={target}", f"--output.dir={tmp_path / target}")
        )
        folder = export(run, "hf", tmp_path / f"hf-{target}")
        model = transformers.ViTMAEForPreTraining.from_pretrained(folder).eval()
        assert model.config.norm_pix_loss == (target == "norm_pix")
        noise, images = torch.rand(2, 16), torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            theirs = model(images, noise=noise)
            loaded = load_pretrained(run)
            ours = loaded(images, mask_from_noise(noise, loaded.mask_ratio))
        assert torch.equal(theirs.mask, ours.mask.hidden)
        torch.testing.assert_close(theirs.loss, ours.loss, rtol=1e-4, atol=1e-5)
        card = (folder / "README.md").read_text()
        facts = (f"target: {target}; mask ratio 0.6", "data: synthetic", "loss: 0.", "Licence")
        task = "pipeline_tag: image-feature-extraction\n"
        for text in (*facts, task, f"starting weights: {start}\n"):
            assert text in card
        start = target
    weights, back = load_weights(run), load_weights(folder)
    assert back.preprocessing == weights.preprocessing
    assert back.preprocessing.mean == (0.5, 0.4, 0.3)
    assert (back.preprocessing.eval_crop, back.preprocessing.image_size) == (0.8, 32)


@pytest.mark.parametrize("size", [(50, 70), (300, 200), (64, 67)])
@pytest.mark.parametrize("eval_crop", [0.875, 1.0])
def test_the_image_processor_gives_our_evaluation_view(size, eval_crop, tmp_path: Path) -> None:
    """Its default backend resizes tensors, ours PIL images: two grey levels are the difference."""
    image = natural(*size)
    folder = export(TINY, "hf", tmp_path / "hf", encoder_num_heads=3, decoder_num_heads=4)
    path = folder / "preprocessor_config.json"
    about = json.loads(path.read_text())
    about["size"]["shortest_edge"] = resized_side(64, eval_crop)
    path.write_text(json.dumps(seal(about)))
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    found = processor(image, return_tensors="pt")["pixel_values"]
    data = DataConfig(eval_crop=eval_crop)
    view, _ = EvalDataset(OneImage([image]), data, 64)[0]
    expected = normalise(view[None], data.mean, data.std)
    assert found.shape == expected.shape
    if size == (64, 67) and eval_crop == 1:  # a margin of 3 pixels begins with 1 there, 2 here
        found, expected = found[..., 1:], expected[..., :-1]
    levels = (found - expected).abs() * torch.tensor(data.std)[:, None, None] * 255
    assert levels.max() <= 2


@pytest.mark.parametrize(
    "flags",
    [("--model.target=hog",), ("--model.decoder_attention=cross",), ("--model.decoder_share=0.5",)],
)
def test_encoders_whose_decoder_has_no_place_open_as_vit_models(flags, tiny, tmp_path) -> None:
    run = pretrain(tiny(*QUICK, *flags))
    folder = export(run, "hf", tmp_path / "hf")
    about = json.loads((folder / "config.json").read_text())
    model = transformers.AutoModel.from_pretrained(folder)
    if about["model_type"] == "vit":
        model, info = transformers.ViTModel.from_pretrained(
            folder, add_pooling_layer=False, output_loading_info=True
        )
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        images, ours = torch.randn(2, 3, 32, 32), load_pretrained(run)
        with torch.no_grad():
            found = model.eval()(images).last_hidden_state
            torch.testing.assert_close(found, ours.encode(images), rtol=1e-4, atol=1e-5)
        assert torch.equal(load_pretrained(folder).encode(images), ours.encode(images))
    else:
        assert flags == ("--model.decoder_share=0.5",)  # of training alone


@pytest.mark.parametrize("probe", ["none", "linear"])
def test_a_classifier_by_the_class_token_gives_the_same_logits(probe, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = vit_of(load_weights(TINY).with_given(3), 3, 64, pool="cls", probe=probe).eval()
    torch.nn.init.normal_(network.get_submodule("head.1" if probe == "linear" else "head").weight)
    run = tmp_path / "run"
    run.mkdir()
    save_file(network.state_dict(), run / "model.safetensors")
    about = {"classes": ["cat", "dog", "newt"], "encoder_num_heads": 3, "grid": [8, 8]}
    (run / "classes.json").write_text(json.dumps(seal(about)))
    folder = export(run, "hf", tmp_path / "hf")
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: image-classification\n" in card
    assert card.count("Not recorded in the checkpoint.") == 2  # its recipe and its figures
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "newt"}
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images).logits, network(images), rtol=1e-4, atol=1e-4)
    back = load_weights(folder)
    assert back.classes == ["cat", "dog", "newt"]
    ours = vit_of(back, 3, 64, pool="cls").eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(images), network(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["timm", "mae", "hf"])
def test_a_rectangular_classifier_is_scored_at_its_own_size(kind, tmp_path: Path, capsys) -> None:
    """Of 2 x 8 patches, which are as many as 4 x 4."""
    torch.manual_seed(0)
    network = vit_of(load_weights(TINY).with_given(3), 3, (16, 64), pool="cls").eval()
    torch.nn.init.normal_(network.head.weight)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    about = {"classes": ["cat", "dog", "newt"], "encoder_num_heads": 3, "grid": [2, 8]}
    (tmp_path / "classes.json").write_text(json.dumps(seal(about)))
    path = export(tmp_path, kind, tmp_path / "out")
    assert ("images of other aspect ratios get" in capsys.readouterr().err) == (kind == "hf")
    found = load_classifier(EvaluateConfig(path), None)
    assert found.image_size == (16, 64)
    images = torch.randn(2, 3, 16, 64)
    with torch.no_grad():
        torch.testing.assert_close(found.network(images), network(images), rtol=0, atol=1e-5)


def test_a_classifier_that_transformers_saved_is_read(tmp_path: Path, capsys) -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=192,
        image_size=32, patch_size=8, num_labels=4, layer_norm_eps=1e-5,
    )  # fmt: skip
    theirs = transformers.ViTForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    weights = load_weights(tmp_path)
    assert weights.classes is None  # LABEL_0 and so on name nothing
    ours = load_classifier(EvaluateConfig(tmp_path), None).network
    export(tmp_path, "timm", tmp_path / "a.safetensors")
    assert "epsilon 1e-05, unlike timm's 1e-06" in capsys.readouterr().err
    again = export(tmp_path, "hf", tmp_path / "again")
    assert "epsilon" not in capsys.readouterr().err
    back = transformers.ViTForImageClassification.from_pretrained(again).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images).logits, rtol=1e-4, atol=1e-5)
        assert torch.equal(back(images).logits, theirs(images).logits)
