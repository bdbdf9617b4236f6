"""Runs resume with other ranks, micro-batches and workers: same samples, order and masks."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from launch import QUIET, run
from PIL import Image

from mae_et import UserError, load_config, pretrain
from mae_et.checkpoints.store import newest_checkpoint
from mae_et.config.data import DataConfig
from mae_et.config.schema import PretrainConfig
from mae_et.data.datasets import open_dataset
from mae_et.data.fingerprint import fingerprint
from mae_et.io.metrics_file import SCORES, read_metrics
from mae_et.training.resume.same_data import check_same_data

FLAGS = (*QUIET, "--output.log_every=1", "--optim.base_lr=1e-3")
VIT = ("--model.image_size=32", "--model.backbone=test_vit")


def samples(recorded: Path, processes: int) -> list[list[str]]:
    """Return the hashes of each step's samples, which `record` wrote, in the order of the batch."""
    steps: dict[int, list[str]] = {}
    for rank in range(processes):
        for line in Path(f"{recorded}-{rank}").read_text().splitlines():
            step, _, digest = json.loads(line)
            steps.setdefault(step, []).append(digest)
    return [steps[step] for step in sorted(steps)]


@pytest.mark.faults
def test_run_resumes_with_other_ranks_micro_batches_and_workers(tmp_path) -> None:
    """Stopped twice: one rank, then two with smaller micro-batches, then one again.

    Image and noise of every sample equal those of an uninterrupted run, bit for bit and in the same
    order; losses and gradient norms are equal up to rounding.
    """
    clean = tmp_path / "clean"
    code, said = run(clean, f"record:path={tmp_path / 'clean-samples'}", *FLAGS)
    assert code == 0, said
    folder = tmp_path / "run"
    parts = [
        (1, 8, ["--efficiency.num_workers=1"]),
        (2, 17, ["--efficiency.micro_batch=3"]),
        (
            1,
            None,
            ["--efficiency.micro_batch={16: 12, 24: 4, 32: 2}", "--efficiency.num_workers=2"],
        ),
    ]
    found: list[list[str]] = []
    for number, (processes, stop, flags) in enumerate(parts):
        recorded = tmp_path / f"samples-{number}"
        fault = f"record:path={recorded}" + ("" if stop is None else f",stop={stop}")
        code, said = run(folder, fault, *FLAGS, *flags, processes=processes)
        assert code == (0 if stop is None else 128 + signal.SIGTERM), said
        found += samples(recorded, processes)
    assert found == samples(tmp_path / "clean-samples", 1)
    one, other = (read_metrics(place) for place in (clean, folder))
    for key in ("loss", "grad_norm"):
        expected = [row[key] for row in one]
        assert [row[key] for row in other] == pytest.approx(expected, rel=2e-5)
    print(f"\n{sum(map(len, found))} samples of {len(found)} steps in the same order")


@pytest.mark.faults
@pytest.mark.parametrize("command", ["supervised", "finetune"])
def test_classifier_resumes_with_other_ranks(tmp_path, command: str) -> None:
    """Without mixing, drop path and batch norms, so losses are equal up to rounding too.

    Image (augmented and erased) and label of every sample equal those of an uninterrupted run,
    bit for bit and in the same order. Resuming on another number of ranks prints a warning.
    """
    flags = VIT
    if command == "finetune":
        code, said = run(tmp_path / "encoder", "none", *QUIET, "--curriculum.epochs=1")
        assert code == 0, said
        flags = ("--model.image_size=32", f"--model.checkpoint={tmp_path / 'encoder'}")
        flags += ("--optim.layer_decay=0.65",)
    clean, folder = tmp_path / "clean", tmp_path / "run"
    fault = f"record:path={tmp_path / 'clean-samples'}"
    code, said = run(clean, fault, *flags, command=command)
    assert code == 0, said
    parts = [
        (1, 5, False, ["--efficiency.num_workers=1"]),
        (2, 11, True, ["--efficiency.micro_batch=3"]),
        (2, 15, False, []),
        (1, 25, True, ["--efficiency.micro_batch={16: 4, 32: 2}", "--efficiency.num_workers=2"]),
        (1, None, False, []),
    ]
    found: list[list[str]] = []
    for number, (processes, stop, differs, more) in enumerate(parts):
        recorded = tmp_path / f"samples-{number}"
        fault = f"record:path={recorded}" + ("" if stop is None else f",stop={stop}")
        code, said = run(folder, fault, *flags, *more, processes=processes, command=command)
        assert code == (0 if stop is None else 128 + signal.SIGTERM), said
        assert said.count("resumes on another number of ranks") == differs
        found += samples(recorded, processes)
    assert found == samples(tmp_path / "clean-samples", 1)
    assert len({digest for step in found for digest in step}) == 8 * len(found)  # none alike
    for name, bounds in (
        ("metrics.jsonl", {"loss": 2e-5, "grad_norm": 1e-4}),
        (SCORES, {"val_loss": 2e-5, "raw_val_loss": 2e-5}),
    ):
        one, other = (read_metrics(place, name) for place in (clean, folder))
        assert [row["step"] for row in other] == [row["step"] for row in one]
        for key, bound in bounds.items():
            pairs = [(a[key], b[key]) for a, b in zip(one, other, strict=True)]
            apart = max(abs(a - b) / abs(a) for a, b in pairs)
            print(f"\n{command}, {name}: {len(pairs)} x {key}, apart by {apart:.1e} at most")
            assert apart < bound
    ends = [json.loads((place / "results.json").read_text()) for place in (clean, folder)]
    assert [(end["steps"], end["val_images"]) for end in ends] == [(len(found), 30)] * 2


def test_changed_batch_size_is_refused(tiny) -> None:
    pretrain(tiny(*QUIET, "--curriculum.epochs=2"))
    with pytest.raises(UserError, match=r"optim\.batch_size was 12 and is now 6"):
        pretrain(tiny(*QUIET, "--curriculum.epochs=2", "--optim.batch_size=6"))


def image_folder(place: Path, names: list[str]) -> Path:
    for number, name in enumerate(names):
        path = place / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 40, 3), number, np.uint8)).save(path)
    return place


def test_renamed_images_are_refused_and_moved_images_are_not(
    tiny_yaml, tmp_path, monkeypatch, capsys
) -> None:
    """With as many images, order and labels would differ silently; of a finished run too."""
    monkeypatch.chdir(tmp_path)
    names = [f"{'ab'[number % 2]}/{number:03d}.png" for number in range(12)]
    here = image_folder(tmp_path / "here", names)
    moved = image_folder(tmp_path / "moved", names)
    other = image_folder(tmp_path / "other", [name.replace("003", "300") for name in names])
    flags = [*QUIET, "--curriculum.epochs=9", f"--output.dir={tmp_path / 'run'}"]
    flags += ["--data.name=folder", "--output.checkpoint_every=4"]

    def config(root: Path) -> PretrainConfig:
        return load_config(PretrainConfig, [tiny_yaml], [*flags, f"--data.root={root}"])

    folder = pretrain(config(here.relative_to(tmp_path)))
    capsys.readouterr()
    monkeypatch.chdir(here)
    pretrain(load_config(PretrainConfig, [folder / "config.yaml"]))  # finds its data, not opened
    assert "data " not in capsys.readouterr().err
    pretrain(config(moved))
    assert f"data.root was {here} and is now {moved}, with the same 12" in capsys.readouterr().err
    with pytest.raises(UserError, match="as many images, but other names or labels"):
        pretrain(config(other))
    saved = newest_checkpoint(folder / "checkpoints")
    assert saved["origin"]["processes"] == 1
    (folder / "results.json").unlink()
    with pytest.raises(UserError, match="as many images, but other names or labels"):
        pretrain(config(other))
    pretrain(config(moved))


def test_more_images_and_replay_on_a_changed_number_of_ranks_are_refused(tiny) -> None:
    """Each rank replays the samples that it loaded itself."""
    source = open_dataset(DataConfig(synthetic_size=32, synthetic_train=40), "train")
    one, two = ({"data": fingerprint(source), "processes": ranks} for ranks in (1, 2))
    saved = {"plan": {"dataset_size": 40}, "origin": two}
    with pytest.raises(UserError, match=r"of 2 ranks and cannot resume on 1: each rank replays"):
        check_same_data(tiny("--data.replay={16: 3}"), saved, 40, one)
    check_same_data(tiny("--data.replay={16: 3}"), saved, 40, two)
    check_same_data(tiny(), saved, 40, one)
    with pytest.raises(UserError, match="had 40 images and now has 41"):
        check_same_data(tiny(), saved, 41, one)
    older = {"plan": {"dataset_size": 40}, "origin": {}}
    check_same_data(tiny(), older, 40, one)


def test_fingerprint_depends_only_on_names_and_their_order(tmp_path) -> None:
    folders = [["a/1.png", "b/2.png"], ["a/1.png", "b/2.png"], ["a/2.png", "b/1.png"], ["a/1.png"]]
    found = []
    for number, names in enumerate(folders):
        root = image_folder(tmp_path / str(number), names)
        found.append(fingerprint(open_dataset(DataConfig(name="folder", root=root), "train")))
    assert found[0] == found[1]
    assert len(set(found)) == 3
