"""Learning dynamics: each kept checkpoint is scored once, on low-pass filtered images."""

import json
import re
from pathlib import Path

import pytest
import torch

from finetune.probing import learning_dynamics
from finetune.probing.learning_dynamics import score_checkpoint
from finetune.scoring_config import DynamicsConfig
from mae_et import UserError, export, load_encoder
from mae_et.checkpoints.listing import list_checkpoints
from mae_et.checkpoints.store import load_checkpoint
from mae_et.cli.main import main
from mae_et.curriculum.frequency import low_frequency_crop, low_pass


def test_a_low_pass_filter_takes_height_and_width() -> None:
    """With the aspect ratio of the images, it keeps the same frequencies along both axes."""
    wave = torch.cos(2 * torch.pi * torch.arange(48) / 6)  # 8 cycles of 48 samples, 4 of 24
    for images in (wave.expand(24, 48), wave[:24, None].expand(24, 48)):
        torch.testing.assert_close(low_pass(images, (8, 16)), images)
        assert low_pass(images, (6, 12)).abs().max() < 1e-5
    with pytest.raises(ValueError, match="between 1 and"):
        low_pass(torch.zeros(24, 48), 32)


@pytest.mark.parametrize(("size", "bandwidth"), [(32, 8), (32, 7), (15, 6), (32, 32)])
def test_a_low_pass_filter_keeps_the_bandwidth_s_crop_and_nothing_above(
    size: int, bandwidth: int
) -> None:
    images = torch.rand(2, 3, size, size, dtype=torch.float64)
    blurred = low_pass(images, bandwidth)
    assert blurred.shape == images.shape
    assert blurred.dtype == images.dtype
    expected = low_frequency_crop(images, bandwidth)
    torch.testing.assert_close(low_frequency_crop(blurred, bandwidth), expected)
    torch.testing.assert_close(low_pass(blurred, bandwidth), blurred)
    frequency = (size * torch.fft.fftfreq(size)).round()
    above = (frequency.abs()[:, None] > bandwidth / 2) | (frequency.abs() > bandwidth / 2)
    assert (torch.fft.fft2(blurred)[..., above].abs() < 1e-9).all()
    torch.testing.assert_close(blurred.mean((-1, -2)), images.mean((-1, -2)))


def test_dynamics_score_each_kept_checkpoint_once(finished: Path, capsys, monkeypatch) -> None:
    folder = finished
    command = ["dynamics", f"--checkpoint={folder}", "--bandwidths=[32,8,8]", "--num_workers=0"]
    assert main(command) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results["checkpoints"] == 2
    found = folder / "dynamics"
    assert {"dynamics.md", "dynamics.png", "dynamics.jsonl"} <= {p.name for p in found.iterdir()}
    assert re.search(r"\| val at 8 +\| val at 32 +\|", (found / "dynamics.md").read_text())
    before = (found / "dynamics.jsonl").read_text()
    rows = [json.loads(line) for line in before.splitlines()]
    assert [row["step"] for row in rows] == [20, 25]
    # At the full bandwidth it is kNN as ever.
    assert main(["knn", f"--checkpoint={folder}", "--num_workers=0"]) == 0
    knn = json.loads(capsys.readouterr().out.splitlines()[-1])["knn"]
    assert rows[-1]["accuracies"][-1] == knn == results["last"]["32"]
    # What was cut off is done again, and nothing else.
    (found / "dynamics.jsonl").write_text(before[: -len(before.splitlines()[-1]) // 2])
    assert main(command) == 0
    assert "step 25:" in (said := capsys.readouterr().err)
    assert "step 20:" not in said
    assert (found / "dynamics.jsonl").read_text() == before
    monkeypatch.chdir(folder)
    assert main(["dynamics", ".", *command[2:]]) == 0  # the same run
    assert "step 2" not in capsys.readouterr().err
    assert main([*command, "--by=linear"]) == 2
    assert "scores of other settings: by was 'knn'" in capsys.readouterr().err
    assert main([*command, "--by=linear", f"--output={folder / 'linear'}"]) == 0
    for flag in ("data.name=synthetic", "architecture=vit_tiny_patch16_224", "checkpoint_key=ema"):
        assert main([*command, f"--{flag}"]) == 2
        assert "is for other encoders" in capsys.readouterr().err


def test_a_stranger_s_run_does_not_decide_where_a_listing_is_written(finished, monkeypatch) -> None:
    path = list_checkpoints(finished / "checkpoints")[-1]
    saved = load_checkpoint(path)
    text = saved["config"].replace("listing: null", "listing: /elsewhere")
    assert text != saved["config"]
    monkeypatch.setattr(learning_dynamics, "load_checkpoint", lambda _: saved | {"config": text})
    monkeypatch.setattr(learning_dynamics, "_accuracies", lambda *given: [given[2].listing])
    row = score_checkpoint(DynamicsConfig(finished, bandwidths=(8,)), path)
    assert row["accuracies"] == [None]


def test_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "step-00000001.pt").write_bytes(b"cut off")
    with pytest.raises(UserError, match=r"00001\.pt is damaged, .*; delete it to score the others"):
        score_checkpoint(DynamicsConfig(tmp_path), tmp_path / "step-00000001.pt")


def test_another_encoder_is_scored_in_one_row(finished: Path, tiny, tmp_path: Path, capsys) -> None:
    """The export of a run without what the run records gives the run's last row."""
    folder = finished
    heads = load_encoder(folder).blocks[0].attn.num_heads
    export(folder, "timm", tmp_path / "vit.safetensors")
    shared = ["--bandwidths=[8,32]", "--num_workers=0"]
    data = tiny().data
    other = [
        f"--checkpoint={tmp_path / 'vit.safetensors'}", f"--encoder_num_heads={heads}",
        f"--data.synthetic_size={data.synthetic_size}",
        f"--data.synthetic_train={data.synthetic_train}",
        f"--data.synthetic_val={data.synthetic_val}",
    ]  # fmt: skip
    results = []
    for flags in ([f"--checkpoint={folder}"], [*other, f"--output={tmp_path / 'other'}"]):
        assert main(["dynamics", *flags, *shared]) == 0
        results.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert results[0]["last"] == results[1]["last"]
    assert results[1]["checkpoints"] == 1
    assert (tmp_path / "other" / "dynamics.md").is_file()
    assert main(["dynamics", *other, *shared]) == 2
    assert "output must be given" in capsys.readouterr().err
    assert main(["dynamics", f"--checkpoint={folder}", "--bandwidths=[64]"]) == 2
    assert "bandwidths: 64 is larger than the image size 32" in capsys.readouterr().err
