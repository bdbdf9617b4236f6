"""Runs that continue a checkpoint of another one: branches, and runs of a larger budget."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_run import config_in

from mae_et import PretrainConfig, UserError, pretrain
from mae_et.checkpoints.listing import checkpoint_step, list_checkpoints
from mae_et.checkpoints.store import load_checkpoint, newest_checkpoint, save_checkpoint
from mae_et.cli.commands import config_of
from mae_et.cli.main import main
from mae_et.config.files import to_yaml
from mae_et.config.init import InitConfig
from mae_et.data.bad_images import RECORD
from mae_et.io.metrics_file import METRICS, SCORES, read_metrics, row_line
from mae_et.training.optim import lr_at
from mae_et.training.plan import plan_of_run
from mae_et.training.resume import branch

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
    monkeypatch.setattr(branch, "fingerprint", lambda source: "another")
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
        ([str(falling), "--extend-to=8"], "falls as a cosine .*--branch-from .* --init"),
        ([str(run), "--extend-to=4"], "must exceed the budget of the run to extend"),
        ([str(classifier), "--extend-to=8"], "extends a run folder of mae-et pretrain"),
    ):
        with pytest.raises(UserError, match=sentence):
            config_of("pretrain", words)


@pytest.fixture(scope="module")
def falling(tmp_path_factory) -> tuple[PretrainConfig, Path]:
    """A run of 16 steps whose learning rate falls as a cosine; the checkpoint of step 8 is kept."""
    flags = ["--optim.decay_fraction=null", "--probe.every=null", "--output.keep_every=8"]
    config = config_in(tmp_path_factory.mktemp("branch"), *flags, recipe=CONSTANT)
    return config, pretrain(config)


def branch_of(start: Path, folder: Path, *flags: str) -> PretrainConfig:
    words = ["--branch-from", str(start), f"--output.dir={folder}", *flags]
    config: PretrainConfig = config_of("pretrain", words)
    return config


def assert_same_end(one: Path, other: Path) -> None:
    """Weights, moments, and the rows of all steps."""
    ends = [newest_checkpoint(folder / "checkpoints") for folder in (one, other)]
    assert ends[0] is not None
    assert ends[1] is not None
    assert ends[0]["step"] == ends[1]["step"]
    for name, weight in ends[0]["model"].items():
        assert weight.equal(ends[1]["model"][name]), name
    for number, moments in ends[0]["optimizer"]["state"].items():
        for name, moment in moments.items():
            assert moment.equal(ends[1]["optimizer"]["state"][number][name]), name
    for key in ("step", "loss", "lr", "compute"):
        rows = [[row[key] for row in read_metrics(folder)] for folder in (one, other)]
        assert rows[0] == rows[1]


def test_a_branch_without_changes_is_the_run_bit_for_bit(falling, tmp_path: Path, capsys) -> None:
    _, run = falling
    start = run / "checkpoints" / "step-00000008.pt"
    pretrain(branch_of(start, tmp_path / "new"))
    line = f"branches from {start} (step 8 of 16); learning rate 0.000469\n"
    assert line in capsys.readouterr().err
    assert_same_end(run, tmp_path / "new")


def test_a_branch_is_planned_and_previewed_before_it_starts(falling, tmp_path, capsys) -> None:
    _, run = falling
    branch = [f"--branch-from={run / 'checkpoints' / 'step-8'}", "--curriculum.epochs=6"]
    main(["plan", *branch, "--json"])
    assert json.loads(capsys.readouterr().out)["steps"] == 24
    assert main(["preview", *branch, f"--save={tmp_path / 'preview.png'}"]) == 0
    assert (tmp_path / "preview.png").exists()
    start = run / "checkpoints" / "step-00000008.pt"
    assert config_of("preview", branch).branch_from == start


def test_a_changed_branch_resumes_bit_for_bit(falling, tmp_path: Path, capsys) -> None:
    """It ends where the checkpoint leads whose recorded config is changed by hand."""
    config, kept = falling
    run = shutil.copytree(kept, tmp_path / "run")
    start = run / "checkpoints" / "step-00000008.pt"
    changes = {"base_lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.9), "clip_grad": 1.0}
    flags = [f"--optim.{key}={list(v) if key == 'betas' else v}" for key, v in changes.items()]
    branch_config = branch_of(start, tmp_path / "new", *flags, "--seed=1")
    pretrain(branch_config, stop_after_step=11)
    said = capsys.readouterr().err
    assert "(step 8 of 16); optim.base_lr 0.02 -> 0.01; optim.weight_decay 0.05 -> 0.1;" in said
    assert "optim.clip_grad None -> 1.0; seed 0 -> 1; learning rate 0.000469 -> 0.000234" in said
    shutil.rmtree(run)
    pretrain(branch_of(start, tmp_path / "new"))  # resumes; its own config has the changes
    assert "branches" not in capsys.readouterr().err

    by_hand = replace(
        config,
        optim=replace(config.optim, **changes),
        output=replace(config.output, dir=tmp_path / "by_hand"),
        seed=1,
    )
    saved = load_checkpoint(kept / "checkpoints" / start.name) | {"config": to_yaml(by_hand)}
    save_checkpoint(by_hand.output.dir / "checkpoints", saved, "", saved["plan"])
    shutil.copy(kept / METRICS, by_hand.output.dir)
    pretrain(by_hand)
    assert_same_end(by_hand.output.dir, tmp_path / "new")
    parent = json.loads((tmp_path / "new" / "results.json").read_text())["parent"]
    assert (parent["checkpoint"], parent["step"], parent["parent"]) == (str(start), 8, None)
    assert parent["changes"]["optim.betas"] == [[0.9, 0.95], [0.8, 0.9]]
    assert parent["changes"].keys() == {"seed", *(f"optim.{key}" for key in changes)}

    again = tmp_path / "new" / "checkpoints" / "step-00000008.pt"
    assert not again.exists()  # of a branch, only its own steps are kept
    pretrain(branch_of(tmp_path / "new", tmp_path / "third", "--curriculum.epochs=5"))
    third = json.loads((tmp_path / "third" / "results.json").read_text())["parent"]
    assert third["step"] == 16
    assert third["parent"] == parent


@pytest.mark.parametrize(("epochs", "last"), [(6, 24), (3, 12)])
def test_the_last_stage_of_a_branch_takes_another_budget(
    falling, tmp_path: Path, capsys, epochs: int, last: int
) -> None:
    """The learning rate falls to the new end, and the line says by how much it jumps."""
    _, run = falling
    start = run / "checkpoints" / "step-00000008.pt"
    config = branch_of(start, tmp_path / "new", f"--curriculum.epochs={epochs}")
    pretrain(config)
    rows = read_metrics(tmp_path / "new")
    assert rows[-1]["step"] == last
    plan = plan_of_run(tmp_path / "new")
    before = plan_of_run(run)
    lr = [lr_at(each.progress(8), config.optim) for each in (before, plan)]
    assert rows[8]["lr"] == pytest.approx(lr[1])
    said = f"curriculum.epochs 4.0 -> {epochs:.1f}; learning rate {lr[0]:.3g} -> {lr[1]:.3g}\n"
    assert said in capsys.readouterr().err


def test_what_a_branch_cannot_change_is_refused(falling, tmp_path: Path) -> None:
    _, run = falling
    start = run / "checkpoints" / "step-00000008.pt"
    new = tmp_path / "new"
    same = branch_of(start, new)
    for section, change, sentence in (
        ("optim", {"batch_size": 4}, "batch_size was 8 .* counted in its steps: give the earlier"),
        ("optim", {"scale_lr_by_decoder_share": True}, "the optimizer's state belongs to it"),
        ("model", {"mask_ratio": 0.5}, "the weights so far were trained with it"),
        ("data", {"flip": 0.0}, "the place in the data belongs to those views"),
        ("data", {"synthetic_train": 16}, "the place in the data belongs"),
        ("curriculum", {"preset": "et"}, "the steps so far belong to that curriculum"),
        ("curriculum", {"epochs": 1.5}, "the plan ends at step 6, and the checkpoint is of step 8"),
        ("curriculum", {"epochs": 0.01}, "leaves the last stage less than one step"),
    ):
        wrong = replace(same, **{section: replace(getattr(same, section), **change)})
        with pytest.raises(UserError, match=sentence) as caught:
            pretrain(wrong)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="ends at step 16, and the checkpoint is of step 16"):
        pretrain(replace(same, branch_from=run))
    missing = run / "checkpoints" / "step-00000007.pt"
    with pytest.raises(UserError, match=rf"no checkpoint {missing}; those .* of steps 8, 16"):
        pretrain(replace(same, branch_from=missing))
    assert not new.exists()
    for words, sentence in (
        ([f"--branch-from={run}"], r"needs the folder of the new run: --output\.dir NEW"),
        ([f"--branch-from={tmp_path}", f"--output.dir={new}"], "needs a run folder, or a checkpoi"),
        ([f"--branch-from={run}", f"--output.dir={new}", f"--init.extends={run}"], "exclude each"),
    ):
        with pytest.raises(UserError, match=sentence):
            config_of("pretrain", words)
    for command in ("demo", "search", "bench node"):
        with pytest.raises(UserError, match=f"{command} continues no run: branch_from must be"):
            config_of(command, [f"--branch-from={run}"])
    with pytest.raises(UserError, match=rf"is now 0\.01; .* --branch-from {run} --output\.dir NEW"):
        pretrain(config_of("pretrain", [str(run), "--optim.base_lr=0.01"]))
