"""What a run says of itself at its start."""

import shutil
from pathlib import Path

import pytest
from image_files import encoded, write_shard
from PIL import Image

import mae_et
from mae_et.pretraining import Pretraining
from mae_et.training.opening import open_early, open_training_images, say_command
from mae_et.training.session import train_run


@pytest.fixture(autouse=True)
def _threads(monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def block(text: str) -> dict[str, str]:
    """Return the facts of the block in the output."""
    lines = [line for line in text.splitlines() if not line.startswith(("mae-et", "step"))]
    return {line[:8].strip(): line[8:] for line in lines}


def test_block_says_what_a_run_is_before_its_first_step(tiny, capfd) -> None:
    config = tiny("--efficiency.micro_batch=6")
    source = open_early("pretrain", config, open_training_images)
    head, *lines = capfd.readouterr().err.splitlines()
    assert head == f"mae-et {mae_et.__version__}: pretrain in {config.output.dir}"
    facts = block("\n".join(lines))
    assert facts == {"data": "synthetic, training split: 40 images, 10 classes"}
    train_run(Pretraining(config, source), stop_after_step=1)
    facts = block(capfd.readouterr().err)
    assert list(facts) == ["model", "plan", "cost", "device", "passes", "curves", "start"]
    model = mae_et.MaskedAutoencoder.from_config(config.model)
    parameters = sum(p.numel() for p in model.encoder.parameters())
    assert f"{parameters / 1e3:.4g}k parameters" in facts["model"]
    assert "GFLOPs an image; 7.5 epochs for the compute of 4.399" in facts["cost"]
    assert facts["device"] == "CPU, 1 thread, float32; 0 loader processes"
    assert facts["plan"] == "25 steps of 12 images, 3 stages at 16 / 24 / 32 px"
    assert facts["passes"] == "micro-batch 12 / 6, not compiled"
    assert facts["curves"] == f"tensorboard --logdir {config.output.dir}"
    assert facts["start"] == "new"
    mae_et.pretrain(config, stop_after_step=2)
    assert block(capfd.readouterr().err)["start"] == "resumes after step 1"
    shutil.rmtree(config.output.dir / "checkpoints")
    mae_et.pretrain(config, stop_after_step=1)
    start = block(capfd.readouterr().err)["start"]
    assert start == "starts again, for there is no checkpoint"


def test_a_refused_run_does_not_say_that_it_resumes(finished, tiny, tmp_path, capfd) -> None:
    config = tiny(f"--output.dir={finished}", "--optim.base_lr=1e-5")
    with pytest.raises(mae_et.UserError, match="holds a checkpoint of another run"):
        mae_et.pretrain(config)
    (tmp_path / "locked" / ".lock").mkdir(parents=True)
    with pytest.raises(mae_et.UserError, match="Is a directory"):
        mae_et.pretrain(tiny(f"--output.dir={tmp_path / 'locked'}"), stop_after_step=1)
    assert "start " not in capfd.readouterr().err


def test_a_finished_run_without_its_encoder_says_that_it_writes_it(finished, capfd) -> None:
    config = mae_et.load_config(
        mae_et.PretrainConfig, [finished / "config.yaml"], [f"--output.dir={finished}"]
    )
    encoder = finished / "encoder.safetensors"
    content = encoder.read_bytes()
    encoder.unlink()
    mae_et.pretrain(config)
    facts = block(capfd.readouterr().err)
    start = "finished before, without encoder.safetensors: writes it from step 25"
    assert (facts["start"], "data" in facts) == (start, True)
    assert encoder.read_bytes() == content
    mae_et.pretrain(config)
    assert capfd.readouterr().err.endswith("\nstart   finished before\n")


def test_other_ranks_print_nothing_and_several_ranks_say_the_rest_once_they_have_joined(
    tiny, capfd, monkeypatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert open_early("pretrain", tiny(), open_training_images) is None
    assert capfd.readouterr().err.count("\n") == 1
    assert open_training_images(tiny())
    assert list(block(capfd.readouterr().err)) == ["data"]
    monkeypatch.setenv("RANK", "1")
    say_command("pretrain", tiny())
    assert open_training_images(tiny())
    assert not capfd.readouterr().err


def test_images_without_a_label_are_counted_in_a_cached_dataset_too(tiny, tmp_path, capfd):
    labelled = {f"{n}.{ending}": content for n in range(12)
                for ending, content in (("png", encoded(n)), ("cls", b"%d" % (n % 2)))}  # fmt: skip
    write_shard(tmp_path / "wds" / "0.tar", labelled | {"12.png": encoded(12)})
    data = ("--data.name=wds", f"--data.root={tmp_path / 'wds'}")
    for cache in ("none", "ram"):
        config = tiny(*data, f"--data.cache={cache}", f"--output.dir={tmp_path / cache}")
        mae_et.pretrain(config, stop_after_step=1)
        said = block(capfd.readouterr().err)["data"]
        assert said.endswith("training split: 13 images, 2 classes, 1 without a label")


def test_images_that_scores_will_lack_or_training_leaves_out_are_announced(
    tiny, tmp_path: Path, capsys
) -> None:
    for number in range(30):
        path = tmp_path / "images" / "train" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(path)
    root, flat = tmp_path / "images", tmp_path / "images" / "train" / "a"
    open_training_images(tiny("--data.name=folder", f"--data.root={root}"))
    sentence = f"data.root {root} has no val split, which scores need: add one, or hold out a fifth"
    assert f"{sentence} with --data.root {root / 'train'}\n" in capsys.readouterr().err
    open_training_images(tiny("--data.name=folder", f"--data.root={flat}"))
    found = capsys.readouterr().err
    assert "3 of 15 are held out as val (--data.train_split . trains on all)\n" in found
    assert "scores need" not in found
    flags = ("--data.name=folder", f"--data.root={flat}", "--data.train_split=.")
    assert len(open_training_images(tiny(*flags))) == 15
