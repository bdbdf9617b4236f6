"""Runs extended to a larger budget."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_run import config_in

from mae_et import PretrainConfig, UserError, pretrain
from mae_et.checkpoints.listing import checkpoint_step, list_checkpoints
from mae_et.checkpoints.store import newest_checkpoint
from mae_et.cli.arguments import config_of
from mae_et.config.files import to_yaml
from mae_et.config.init import InitConfig
from mae_et.data.bad_images import RECORD
from mae_et.io.metrics_file import SCORES, read_metrics, row_line
from mae_et.training.resume import extension

CONSTANT = """
model: {encoder: vit_tiny_patch16_224, image_size: 16, patch_size: 8, encoder_embed_dim: 16,
        encoder_depth: 1, encoder_num_heads: 2, decoder_embed_dim: 8, decoder_depth: 1,
        decoder_num_heads: 2}
data: {synthetic_size: 16, synthetic_train: 32, synthetic_val: 8}
curriculum: {preset: constant, epochs: 4}
optim: {batch_size: 8, base_lr: 0.02, warmup_fraction: 0.25, decay_fraction: 0.25}
efficiency: {num_workers: 0, device: cpu}
probe: {every: 50%, max_fraction: 1, train_images: 8, val_images: 4}
output: {log_every: 1, checkpoint_every: 50%, keep_last: 1, reconstruct_images: 0,
         tensorboard: false}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[PretrainConfig, Path]:
    """A run of 16 steps, 4 of warm-up and 4 of decay."""
    config = config_in(tmp_path_factory.mktemp("extension"), recipe=CONSTANT)
    return config, pretrain(config)


def steps(folder: Path) -> list[int]:
    return [checkpoint_step(path) for path in list_checkpoints(folder / "checkpoints")]


def test_an_extended_run_is_the_longer_run_bit_for_bit(finished, tmp_path: Path, capsys) -> None:
    """Interrupted and resumed, after the first run was deleted: its records too, each row once."""
    config, kept = finished
    assert steps(kept) == [13, 16]  # the 13th step is the last of the constant learning rate
    run = shutil.copytree(kept, tmp_path / "run")
    unreadable = [{"step": step, "sample": step, "reason": "damaged"} for step in (5, 15)]
    (run / RECORD).write_text("".join(row_line(row, RECORD) for row in unreadable))
    flags = ["--data.cache=ram", "--data.on_error=skip", f"--output.dir={tmp_path / 'extended'}"]
    extended = config_of("pretrain", [str(run), "--extend-to", "8", *flags])
    assert extended.optim.warmup_fraction == 0.125  # as many steps of a run twice as long
    pretrain(extended, stop_after_step=20)
    said = capsys.readouterr().err
    assert f"extending {run}/checkpoints/step-00000013.pt (step 13 of 32): bandwidth 16" in said
    assert "learning rate 0.000625 to step 25, then falling to 0" in said
    shutil.rmtree(run)
    pretrain(extended)
    assert "extending" not in capsys.readouterr().err
    longer = replace(
        config,
        curriculum=replace(config.curriculum, epochs=8),
        optim=replace(config.optim, warmup_fraction=0.125),
        output=replace(config.output, dir=tmp_path / "longer"),
    )
    pretrain(longer)
    folders = (tmp_path / "longer", tmp_path / "extended")
    assert [steps(folder) for folder in folders] == [[25, 32]] * 2
    ends = [newest_checkpoint(folder / "checkpoints") for folder in folders]
    for name, weight in ends[0]["model"].items():
        assert weight.equal(ends[1]["model"][name]), name
    for key in ("step", "loss", "lr", "compute"):
        rows = [[row[key] for row in read_metrics(folder)] for folder in folders]
        assert rows[0] == rows[1]
    assert read_metrics(folders[1], RECORD) == unreadable[:1]  # the 15th step is another's now
    probed = [read_metrics(folder, SCORES) for folder in (kept, folders[1])]
    assert [[row["step"] for row in rows] for rows in probed] == [[0, 8, 16], [0, 8, 16, 32]]
    assert probed[0][:2] == probed[1][:2]


def test_runs_that_cannot_be_extended_are_refused(finished, tmp_path: Path, monkeypatch) -> None:
    config, run = finished
    falling = tmp_path / "cosine"
    falling.mkdir()
    cosine = replace(config, optim=replace(config.optim, decay_fraction=None))
    (falling / "config.yaml").write_text(to_yaml(cosine))
    (falling / "plan.json").write_text((run / "plan.json").read_text())
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.yaml").write_text(to_yaml(config))
    (empty / "plan.json").write_text((run / "plan.json").read_text())

    def extending(folder: Path, before: PretrainConfig = config, **optim: object) -> PretrainConfig:
        return replace(
            before,
            init=InitConfig(extends=folder),
            curriculum=replace(before.curriculum, epochs=8),
            optim=replace(before.optim, **optim),
            output=replace(before.output, dir=tmp_path / "new"),
        )

    decaying = replace(config, optim=replace(config.optim, weight_decay_end=0.5))
    moving = shutil.copytree(run, tmp_path / "moving")
    (moving / "config.yaml").write_text(to_yaml(decaying))

    for wrong, sentence in (
        (extending(tmp_path), "is not a run folder"),
        (extending(empty), r"no checkpoint of its constant learning rate \(steps 4 to 13\)"),
        (extending(run, base_lr=0.01), r"optim\.base_lr was 0\.02 and is now 0\.01"),
        (extending(run, warmup_fraction=0.5), "would jump from 0.000625 to 0.000508 at step 13"),
        (extending(moving, decaying), r"weight decay moves .* \(optim\.weight_decay_end\)"),
    ):
        with pytest.raises(UserError, match=sentence) as caught:
            pretrain(wrong)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "new").exists()
    monkeypatch.setattr(extension, "fingerprint", lambda source: "another")
    adapted = tmp_path / "adapted"  # whose initial weights are gone
    adapted.mkdir()
    (adapted / "config.yaml").write_text(to_yaml(replace(config, init=InitConfig("gone.pth"))))
    assert str(config_of("pretrain", [str(adapted), "--extend-to=8"]).init.weights) == "gone.pth"
    with pytest.raises(UserError, match="was trained on other images"):
        pretrain(extending(run))
    classifier = tmp_path / "classifier"
    classifier.mkdir()
    for name in ("config.yaml", "classes.json"):
        (classifier / name).write_text("model: {checkpoint: x}")
    for words, sentence in (
        (["--extend-to=8"], "needs the run to extend"),
        ([str(tmp_path / "none"), "--extend-to=8"], "extends a run folder of mae-et pretrain"),
        ([str(run), "--extend-to", "many"], "must be a number of epochs, got 'many'"),
        ([str(falling), "--extend-to=8"], "falls as a cosine .* its weights instead, .*--init"),
        ([str(run), "--extend-to=4"], "must exceed the budget of the run to extend"),
        ([str(classifier), "--extend-to=8"], "extends a run folder of mae-et pretrain"),
    ):
        with pytest.raises(UserError, match=sentence):
            config_of("pretrain", words)
