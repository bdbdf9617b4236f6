"""The command line as users meet it."""

import errno
import json
import multiprocessing
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from image_files import save
from tiny_run import GOLDEN, TINY
from torchvision.io import read_image
from user_errors import error_of

from mae_et import load_pretrained
from mae_et.cli.command import Command
from mae_et.cli.commands import COMMANDS
from mae_et.cli.main import main
from mae_et.config.shipped import find_config, shipped_configs
from mae_et.io.metrics_file import read_metrics


def last_json(text: str) -> dict:
    return json.loads(text.strip().splitlines()[-1])


@pytest.mark.parametrize(
    ("failure", "sentence"),
    [(torch.OutOfMemoryError("CUDA out of memory"), "CUDA out of memory: --efficiency"),
     (RuntimeError("DataLoader worker (pid 3) is killed by signal"), "a loader worker died, as")],
)  # fmt: skip
def test_system_errors_are_one_sentence_in_every_command(
    failure: Exception, sentence: str, monkeypatch, capsys
) -> None:
    def fails(_: list[str]) -> None:
        raise failure

    for name in COMMANDS:
        monkeypatch.setitem(COMMANDS, name, Command(name, fails))
        assert main([name]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"mae-et: {sentence}")
        assert error.count("\n") == 1


@pytest.mark.parametrize("buffering", [-1, 1])
def test_a_closed_stdout_ends_commands_quietly(buffering: int, monkeypatch, capfd) -> None:
    kept = os.dup(1)
    try:
        for words in (["--help"], ["plan", "--help"], ["plan", "--config=demo", "--json"]):
            reader, writer = os.pipe()
            os.close(reader)
            os.dup2(writer, 1)
            os.close(writer)
            with open(1, "w", buffering=buffering, closefd=False) as stdout:
                monkeypatch.setattr("sys.stdout", stdout)
                assert main(words) == 128 + signal.SIGPIPE
    finally:
        os.dup2(kept, 1)
        os.close(kept)
    printed = capfd.readouterr().err.splitlines()
    # PyTorch's threads of earlier tests may print, too, with paths that contain any word.
    ours = re.compile(r"mae-et|Traceback|Exception(?! raised from)|.*Broken ?[Pp]ipe")
    assert not [line for line in printed if ours.match(line)]


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_stream_that_was_closed_at_the_start_is_no_error(stream: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, stream, None)
    assert main(["knn", "nothing"]) == 2


def test_a_broken_pipe_that_is_not_stdout_s_is_reported(monkeypatch, capsys) -> None:
    def fails(_: list[str]) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setitem(COMMANDS, "plan", Command("plan", fails))
    assert main(["plan"]) == 1
    assert capsys.readouterr().err == "mae-et: Broken pipe\n"


def test_a_system_error_in_a_loader_process_is_one_sentence(monkeypatch, capsys) -> None:
    def fails(_: list[str]) -> None:
        raise OSError(
            "Caught OSError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
            "last):\n  line 1\nOSError: [Errno 5] Input/output error\n"
        )

    monkeypatch.setitem(COMMANDS, "plan", Command("plan", fails))
    assert main(["plan"]) == 1
    assert capsys.readouterr().err == "mae-et: Input/output error\n"


@pytest.mark.skipif(sys.platform != "linux", reason="forks only on Linux")
def test_loader_processes_are_forked_whatever_python_s_default() -> None:
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        assert main(["plan", "--config", "demo"]) == 0
        assert multiprocessing.get_start_method() == "fork"
    finally:
        multiprocessing.set_start_method(before, force=True)


def test_commands_of_one_process_are_refused_to_several_ranks(monkeypatch, capsys) -> None:
    """Each rank would write the same files; WORLD_SIZE alone, as containers set it, starts none."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert main(["plan", "--images=10000"]) == 0
    capsys.readouterr()
    monkeypatch.setenv("RANK", "1")
    for name in ("knn", "linear-probe", "embed", "search", "demo"):
        assert main([name]) == 2
        refusal = f"mae-et: {name} runs in one process, and WORLD_SIZE is 8: start it alone\n"
        assert capsys.readouterr().err == refusal


def test_tasks_of_srun_without_ranks_are_reported(monkeypatch, capsys) -> None:
    """Each would train alone: all but the first are refused by the lock of the run folder."""
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert main(["pretrain", "--config=nope"]) == 2
    assert "warning: srun started 2 tasks, which do not" in capsys.readouterr().err


def test_a_run_stopped_after_some_steps_resumes_as_if_it_had_not_been(
    tiny_yaml: Path, tmp_path: Path, capsys
) -> None:
    command = ["pretrain", f"--config={tiny_yaml}", "--output.tensorboard=false"]
    run, whole = tmp_path / "stopped", tmp_path / "whole"
    assert main([*command, "--stop-after-step", "4", f"--output.dir={run}"]) == 0
    printed = capsys.readouterr()
    assert "stop    after step 4; without --stop-after-step, the command resumes" in printed.err
    assert last_json(printed.out) == {"run": str(run)}
    assert [row["step"] for row in read_metrics(run)] == [2, 4]
    assert main(["pretrain", str(run), "--stop-after-step=6"]) == 0
    assert main(["pretrain", str(run)]) == 0  # the cap is no part of the run
    assert main([*command, f"--output.dir={whole}"]) == 0
    written = [(folder / "encoder.safetensors").read_bytes() for folder in (run, whole)]
    assert written[0] == written[1]
    for word in ("0", "many", ""):
        assert main([*command, f"--stop-after-step={word}"]) == 2
        assert (
            f"--stop-after-step must be a number of steps, got {word!r}" in capsys.readouterr().err
        )


@pytest.fixture
def user_errors(tmp_path: Path) -> dict[str, list[str]]:
    (tmp_path / "empty").mkdir()
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "file").write_text("")
    tiny = [f"--config={tmp_path / 'tiny.yaml'}", f"--output.dir={tmp_path / 'run'}"]
    golden = GOLDEN / "mae_tiny_released_format.pth"
    heads = ["--encoder_num_heads=3", "--decoder_num_heads=4"]
    custom = "--curriculum.stages=[{bandwidth: %d, share: 1}]"
    return {
        "images must lie in (0, 1e15), got 0": ["plan", "--images=0"],
        "images must lie in (0, 1e15), got 999": ["plan", f"--images={'9' * 400}"],
        "did you mean --model.mask_ratio?": ["pretrain", *tiny, "--mask-ratio=0.5"],
        "--data.root; images come after --images": ["reconstruct", str(golden), "--data.root=x"],
        "of keys (data.name, data.root, ": ["pretrain", *tiny, "--data=photos"],
        r"'--data.root=\udcfc' is not UTF-8": ["pretrain", *tiny, "--data.root=\udcfc"],
        "; a config comes after --config": ["pretrain", str(tmp_path / "tiny.yaml")],
        "; data come after --data.root": ["pretrain", str(tmp_path / "empty")],
        "the checkpoint comes first (knn RUN ...)": ["knn", "--batch_size=2", str(golden)],
        "bandwidth 20 is not a multiple of the patch size 8": ["pretrain", *tiny, custom % 20],
        "there is no image in": ["pretrain", *tiny, f"--data.root={tmp_path / 'empty'}"],
        "is not a folder": ["pretrain", *tiny, f"--data.root={tmp_path / 'missing'}"],
        "save must end in .png": ["preview", *tiny, "--save=preview.txt"],
        "output must end in .png": ["reconstruct", str(golden), "--output=images.jpg"],
        "there is no config 'nope'": ["pretrain", "--config", "nope"],
        "there is no checkpoint m": ["evaluate", "m.pth", f"--data.root={tmp_path / 'empty'}"],
        "holds no checkpoint that loads": ["linear-probe", "--checkpoint", str(tmp_path / "empty")],
        "cannot be read": ["reconstruct", f"--checkpoint={tmp_path / 'file'}"],
        "model.mask_ratio at bandwidth 16": ["pretrain", *tiny, "--model.mask_ratio=0.9"],
        f"output.dir {tmp_path / 'file' / 'x'}: Not a directory": [
            "pretrain", *tiny, f"--output.dir={tmp_path / 'file' / 'x'}",
        ],
        "checkpoint is empty": ["knn", "--checkpoint"],
        "image_size must be positive": ["preview", "--features=x", "--image_size=0"],
        "bandwidths must be positive": ["dynamics", f"--checkpoint={tmp_path}", "--bandwidths=[0]"],
        "give encoder_num_heads": ["reconstruct", f"--checkpoint={golden}", "--images=x.png"],
        "images must be given": ["reconstruct", str(golden), "--target=norm_pix", *heads],
        "data must be given": ["knn", f"--checkpoint={golden}", heads[0]],
        "torch sees no CUDA device": ["pretrain", *tiny, "--efficiency.device=cuda"],
        "contain it; did you mean vit_base_patch8_224": ["plan", "--model.encoder=vit_bas"],
        "6; did you mean vit_base_patch16_224": ["plan", "--model.encoder=vit_base_patch6_224"],
        "name; did you mean vit_base_patch16_224": [
            "plan", "--model.encoder=vit_base_patch16_22", "--images=9999",
        ],
        "(resne18); did you mean resnet18": [
            "supervised", "--model.backbone=resne18", "--data.name=synthetic",
            "--optim.batch_size=8",
        ],
        "checkpoint resne18; did you mean resnet18": ["knn", "resne18"],
        "data.name 'imagenet' is unknown": ["pretrain", *tiny, "--data.name=imagenet"],
    }  # fmt: skip


def test_user_errors_are_one_sentence_and_exit_with_2(user_errors, capsys, tmp_path) -> None:
    for sentence, arguments in user_errors.items():
        assert main(arguments) == 2, sentence
        shown = capsys.readouterr()
        error = error_of(shown.err)
        assert sentence in error
        assert error.startswith("mae-et: ")
        assert error.count("\n") == 1
        assert not shown.out
    assert not (tmp_path / "run").exists()


def test_a_deleted_current_folder_is_named(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["plan", "--config=demo"]) == 2
    assert "the current folder was deleted" in capsys.readouterr().err


def test_pretrain_probe_and_reconstruct_from_the_run_folder_alone(tiny, tiny_yaml, capsys) -> None:
    folder = tiny().output.dir
    assert main(["pretrain", f"--config={tiny_yaml}", f"--output.dir={folder}"]) == 0
    results = last_json(capsys.readouterr().out)
    assert results["run"] == str(folder)
    assert results["loss"] == read_metrics(folder)[-1]["loss"]
    for command, epochs in (("knn", []), ("linear-probe", ["--epochs=3"])):
        assert main([command, f"--checkpoint={folder}", "--num_workers=0", *epochs]) == 0
        figures = last_json(capsys.readouterr().out)
        score = "knn" if command == "knn" else "linear"
        expected = {"data", "provenance", score, f"{score}_standard_error"}
        if score == "linear":  # the epochs are no default
            expected |= {"linear_learning_rate", "settings"}
        assert set(figures) == expected
    few = ["--data.synthetic_val=30", "--num_workers=0"]
    assert main(["knn", f"--checkpoint={folder}", *few]) == 0
    photo = save(folder / "photo.jpg")
    output = folder / "reconstruction.png"
    features = folder / "features.npy"
    assert main(["embed", str(folder), f"--output={features}", "--num_workers=0"]) == 0
    assert last_json(capsys.readouterr().out)["shape"] == [60, 32]
    whole, encoder = load_pretrained(folder), load_pretrained(folder / "encoder.safetensors")
    pixels = torch.randn(1, 3, 32, 32)
    assert torch.equal(whole.encode(pixels), encoder.encode(pixels))
    assert encoder.decoder is None
    for images, rows in (([], 8), ([f"--images=[{photo}]"], 1)):
        assert main(["reconstruct", f"--checkpoint={folder}", f"--output={output}", *images]) == 0
        assert last_json(capsys.readouterr().out) == {"image": str(output)}
        assert read_image(str(output)).shape == (3, 20 + rows * 100 + 4, 404)
    flags = [f"--checkpoint={folder}", "--bandwidth=20"]
    assert main(["reconstruct", *flags]) == 2


def test_an_unreadable_image_stops_the_run_with_its_name(tiny_yaml, tmp_path, capsys) -> None:
    for number in range(30):
        path = save(tmp_path / "images" / f"{number}.png")
    path.write_bytes(path.read_bytes()[:40])
    flags = [f"--data.root={tmp_path / 'images'}", f"--output.dir={tmp_path / 'run'}",
             "--data.max_bad_fraction=0"]  # fmt: skip
    few = "mae-et: 1 of 24 images cannot be read, more than data.max_bad_fraction 0 allows: "
    for policy, sentence in (("stop", f"mae-et: cannot read the image {path}"), ("skip", few)):
        for workers in (0, 1):
            more = [f"--efficiency.num_workers={workers}", f"--data.on_error={policy}"]
            assert main(["pretrain", f"--config={tiny_yaml}", *flags, *more]) == 1
            error = capsys.readouterr().err.strip().splitlines()[-1]
            assert error.startswith(sentence)
            assert str(path) in error


def test_every_command_has_help(capsys) -> None:
    assert main([]) == 2
    assert main(["--help"]) == 0
    listing = capsys.readouterr().out
    for name in COMMANDS:
        assert f"  {name} " in listing
        assert main([name, "--help"]) == 0
        expected = {
            "submit": "--cluster FILE_OR_NAME", "status": "--watch", "bench": "bench NAME --help",
            "report": "--output", "configs": "[WORD ...]", "completion": "mae-et completion bash",
        }  # fmt: skip
        text = capsys.readouterr().out
        assert expected.get(name, "--config") in text
        assert text.count("usage:") == (name != "bench")
    assert main(["--version"]) == 0


def test_shipped_configs_are_listed_with_the_first_sentence_of_their_headers(capsys) -> None:
    assert main(["configs", "VIT_B16", "headline", "--json"]) == 0
    about = (
        "ViT-B/16: EfficientTrain++ on MAE, 400 equivalent epochs, HOG targets: the headline recipe"
    )
    assert last_json(capsys.readouterr().out) == {"pretrain/vit_b16_etpp_hog_400ep": about}
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(list(shipped_configs().rglob("*.yaml")))
    for line in lines:
        name, about = line.split(maxsplit=1)
        assert find_config(name).is_file()
        assert 15 < len(about) < 160
    for words in (["no-such-model"], ["--config=demo"]):
        assert main(["configs", *words]) == 2
