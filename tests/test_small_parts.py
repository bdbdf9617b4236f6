"""An example, or a law, of small public functions that larger tests pass through without a word."""

import errno
import json
import os
import pickle
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from finetune.image_size import base_of, cost_at, format_size, sides_of
from finetune.learning_dynamics import DynamicsConfig, score_checkpoint
from finetune.model import freeze_encoder
from mae_et import Curriculum, PretrainConfig, UserError
from mae_et.checkpoints.formats import differences, unwrap
from mae_et.checkpoints.load import depth_of, heads_of
from mae_et.checkpoints.run_config import config_of
from mae_et.checkpoints.store import (
    checkpoint_step,
    first_sentence,
    list_checkpoints,
    refused_content,
    set_aside_newer,
)
from mae_et.cli.main import main
from mae_et.config.files import load_config, numeric_keys, one_sentence, to_yaml
from mae_et.config.schema import DataConfig, EfficiencyConfig, Stage, check_statistics
from mae_et.config.untrusted import check_flags, check_text
from mae_et.curriculum.frequency import crop_matrix
from mae_et.data.arrays import read_array
from mae_et.data.datasets import open_dataset
from mae_et.data.decoding import Box, check_channels, extensions_of
from mae_et.data.image_folder import data_root, split_name
from mae_et.data.jpeg_crop import whole_pixels
from mae_et.data.plain_pickle import load
from mae_et.data.transforms import as_tensor, flipped_anew
from mae_et.errors import RunFailed, Unreadable
from mae_et.io.atomic import write_text_atomically
from mae_et.io.lock import check_writable, sole_writer
from mae_et.io.plain_files import read_mapping, read_text
from mae_et.monitoring.logger import format_seconds, seconds_left
from mae_et.runtime.distributed import DistributedContext, broadcast_buffers
from mae_et.runtime.signals import stop_signals
from mae_et.runtime.system_errors import explain_system_errors
from mae_et.training.metrics import peak_memory, summarise_stages
from mae_et.training.resume import check_same_run
from slurm import retry
from slurm.command import Task
from slurm.config import ClusterConfig, job_name
from slurm.journal import events_file, log_file, note, read_events, this_job
from slurm.run_status import as_dicts, find_runs, status, table


def test_sizes_are_sides_in_pixels() -> None:
    assert sides_of(64) == (64, 64)
    assert sides_of((96, 128)) == (96, 128)
    assert base_of((96, 128)) == 96
    assert [format_size(64), format_size((96, 128))] == ["64", "96 x 128"]
    assert cost_at((96, 128), 16, None, 3)(48) == 48 * 64


def test_a_box_in_whole_pixels_lies_in_the_picture_and_is_not_empty() -> None:
    assert whole_pixels(Box(1.4, 2.6, 3, 4), 10, 10) == (1, 3, 4, 7)
    assert whole_pixels(Box(9.9, 9.9, 0.1, 0.1), 10, 10) == (9, 9, 10, 10)


def test_only_marked_images_are_flipped_anew_and_only_where_a_half_were() -> None:
    images = torch.arange(48.0).view(8, 1, 2, 3)
    marked = torch.arange(8) % 2 == 0
    flipped = flipped_anew(images, marked, 0.5, torch.Generator().manual_seed(1))
    changed = (flipped != images).flatten(1).any(1)
    assert changed.any()
    assert not changed[~marked].any()
    assert torch.equal(flipped[changed], images[changed].flip(-1))
    assert flipped_anew(images, marked, 0.3, torch.Generator()) is images


def test_a_tensor_stays_as_it_is() -> None:
    tensor = torch.zeros(3, 2, 2)
    assert as_tensor(tensor) is tensor


def test_a_crop_s_matrix_keeps_constants_and_is_made_once() -> None:
    found = crop_matrix(8, 4, torch.device("cpu"), torch.float32)
    assert crop_matrix(8, 4, torch.device("cpu"), torch.float32) is found


def test_compute_before_a_step_adds_up_stage_by_stage() -> None:
    plan = Curriculum.preset("etpp", 64, 8).plan(20, 100, 10)
    by_step = [plan.at(step).cost * plan.batch_size for step in range(plan.steps)]
    for step in (0, 1, plan.steps // 2, plan.steps):
        assert plan.compute_before(step) == pytest.approx(sum(by_step[:step]))


def test_a_run_s_stages_are_summed_from_its_rows() -> None:
    plan = Curriculum.preset("constant", 64, 8).plan(2, 100, 10)
    rows = [{"stage": 0, "window_steps": 2, "window_seconds": 4.0, "loss": loss} for loss in (3, 1)]
    (stage,) = summarise_stages(rows, plan)
    assert stage["images"] == 200  # of the plan: rows can be lost to a damaged disk
    assert (stage["images_per_second"], stage["loss"]) == (5.0, 1)
    (lost,) = summarise_stages([], plan)
    assert (lost["images"], lost["images_per_second"], lost["loss"]) == (200, None, None)


def test_time_left_is_time_taken_in_the_ratio_of_compute() -> None:
    assert seconds_left({"seconds": 100.0, "compute": 0.25}) == 300
    assert format_seconds(3661.4) == "1:01:01"
    assert peak_memory(torch.device("cpu")) > 2**20  # this process holds more than a MiB


def test_files_are_named_and_set_aside_by_their_steps(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        (tmp_path / f"step-{step:08d}.pt").touch()
    assert checkpoint_step(tmp_path / "step-00000003.pt") == 3
    set_aside_newer(tmp_path, 1)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-00000001.pt", "step-00000002.pt.damaged", "step-00000003.pt.damaged"]


def test_errors_of_others_become_one_sentence() -> None:
    assert first_sentence(KeyError("a\n b. And more.")) == "KeyError: 'a\\n b"
    assert one_sentence(ValueError("a\n  <class 'int'>")) == "a int"
    refusal = pickle.UnpicklingError("Unsupported global: GLOBAL os.system was not an allowed")
    assert refused_content(refusal) == "it holds os.system"
    assert refused_content(pickle.UnpicklingError("?")) == "it is not a plain file of tensors"


def test_text_and_mappings_are_read_or_refused(tmp_path: Path) -> None:
    write_text_atomically(tmp_path / "a.json", '{"a": 1}')
    assert read_mapping(tmp_path / "a.json") == {"a": 1}
    for content in (b"[1]", b"{", b"\xff", b"[" * 100_000):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.json"):
            read_mapping(tmp_path / "a.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_text(tmp_path / "gone")


def test_an_array_is_as_long_as_it_says(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(10))
    assert read_array(tmp_path / "a.npy").tolist() == list(range(10))
    content = (tmp_path / "a.npy").read_bytes()
    for lie in (content[:-8], content.replace(b"(10,)", b"(10**9,)"), b"", b"PK\3\4"):
        (tmp_path / "a.npy").write_bytes(lie)
        with pytest.raises((ValueError, OSError)):
            read_array(tmp_path / "a.npy")


def test_a_pickle_of_arrays_is_read_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for protocol in (0, 2):  # of later ones arrays are made otherwise
        path.write_bytes(pickle.dumps({"a": np.arange(3), "b": [1, "x"]}, protocol))
        with path.open("rb") as file:
            assert load(file, encoding="latin1")["a"].tolist() == [0, 1, 2]
    path.write_bytes(pickle.dumps(Path("x")))
    with path.open("rb") as file, pytest.raises(pickle.UnpicklingError, match="pathlib"):
        load(file)


def test_a_shape_of_a_config_is_checked_before_its_values() -> None:
    check_text("model: {encoder: x}", PretrainConfig)  # which the parser then judges
    check_flags(["--model.encoder=x", "--seed", "3"], PretrainConfig)
    for text in ("model: x", "[1]", "a: {class_path: x}", "config: x", "a: &a [*a]", "a: ["):
        with pytest.raises(UserError):
            check_text(text, PretrainConfig)
    for words in (["--model=x"], ["--model", "x"], ["--model.class_path=x"]):
        with pytest.raises(UserError):
            check_flags(words, PretrainConfig)


def test_what_decides_numbers_is_neither_effort_nor_output() -> None:
    keys = numeric_keys(PretrainConfig())
    assert "optim.base_lr" in keys
    assert "seed" in keys
    assert not [key for key in keys if key.startswith(("output", "efficiency"))]


def test_statistics_are_one_for_all_or_one_for_each_channel() -> None:
    check_statistics(DataConfig(mean=(0.5,), std=(0.5,)), 7)
    with pytest.raises(UserError, match="3 numbers for 1 channels"):
        check_statistics(DataConfig(), 1)


def test_channels_say_which_files_are_images() -> None:
    assert ".png" in extensions_of(3)
    assert extensions_of(7) == (".npy",)
    with pytest.raises(UserError, match="needs arrays"):
        check_channels(7)


def test_a_data_set_s_folder_and_splits_are_as_named(tmp_path: Path) -> None:
    config = DataConfig(root=tmp_path, val_split="test")
    assert data_root(config) == tmp_path
    assert [split_name(config, "train"), split_name(config, "val")] == ["train", "test"]
    with pytest.raises(UserError, match="not a folder"):
        data_root(DataConfig(root=tmp_path / "gone"))


def test_a_network_s_shape_is_read_from_names_and_widths() -> None:
    weights = {f"blocks.{n}.{part}": torch.zeros(1) for n in (0, 1, 2) for part in ("a", "b")}
    assert depth_of(weights) == 3
    assert heads_of("encoder", 768, None, {768: 12}) == 12
    assert heads_of("encoder", 8, 2, {}) == 2
    for width, given in ((8, None), (8, 3)):
        with pytest.raises(UserError, match="encoder"):
            heads_of("encoder", width, given, {})


def test_weights_are_unwrapped_and_their_differences_told() -> None:
    inner = {"module.a": torch.zeros(1), "b": "text"}
    assert list(unwrap({"state_dict": inner, "epoch": 1})) == ["a"]
    ours = {"a": torch.zeros(2), "c": torch.zeros(1)}
    said = differences({"a": torch.zeros(1), "d": torch.zeros(1)}, ours)
    assert said == "1 missing (c); 1 unexpected (d); 1 misshapen (a is [1], not [2])"
    assert differences({}, {"head.x": torch.zeros(1)}, may_lack=("head.",)) == ""


def test_only_a_head_is_trained_of_a_frozen_encoder() -> None:
    network = nn.ModuleDict({"blocks": nn.Linear(1, 1), "head": nn.Linear(1, 1)})
    freeze_encoder(network)
    trained = [name for name, p in network.named_parameters() if p.requires_grad]
    assert trained == ["head.weight", "head.bias"]


def test_one_process_shares_nothing() -> None:
    norm = nn.BatchNorm1d(2)
    broadcast_buffers(norm, DistributedContext(0, 1, torch.device("cpu")))
    assert norm.running_mean.tolist() == [0, 0]


# --- slurm ----------------------------------------------------------------------------------------


def test_a_job_is_named_after_its_run_unless_it_has_a_name(tmp_path: Path) -> None:
    assert job_name(ClusterConfig(), tmp_path / "mine") == "mae-et-mine"
    assert job_name(ClusterConfig(name="x"), tmp_path) == "x"


def test_a_probe_runs_in_one_process_and_a_training_does_not(tmp_path: Path) -> None:
    kinds = {"knn": True, "compare": True, "pretrain": False, "evaluate": False}
    for kind, single in kinds.items():
        found = Task(kind, ["--a=1"], tmp_path, None)
        assert found.is_single is single
        assert found.command_line == [kind, "--a=1"]


def test_events_are_a_run_s_and_tell_the_job(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert this_job() == {"job": "4_2", "restart": 1}
    note(tmp_path, "started")
    assert events_file(tmp_path).is_file()
    assert read_events(tmp_path)[0]["job"] == "4_2"
    assert find_runs(tmp_path.parent)  # the folder above it holds a run


def test_what_srun_says_last_of_a_killed_process_is_its_reason(tmp_path: Path) -> None:
    note(tmp_path, "submitted", job="7", logs=str(tmp_path / "slurm"))
    events = read_events(tmp_path)
    path = log_file(tmp_path, events, "7")
    assert path == tmp_path / "slurm" / "7_0_log.err"
    assert retry.killed_task(tmp_path, "7", events) == ""
    path.write_text("srun: error: n1: task 0: Killed\nsrun: error: n1: task 1: Terminated\n")
    assert retry.killed_task(tmp_path, "7", events) == "n1: task 0: Killed"


def test_status_is_json(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("slurm.squeue.run", lambda *_: None)
    note(tmp_path, "started", job="7")
    (about,) = json.loads(json.dumps(as_dicts(status([tmp_path]))))
    assert about["run"] == str(tmp_path)


def test_memory_that_is_not_there_is_told_in_a_sentence() -> None:
    """Of a picture, of numpy and of torch on a CPU: no traceback, whatever size is asked for."""

    def of_numpy() -> None:
        np.empty(10**15)

    def of_torch() -> None:
        torch.empty(10**15)

    def beyond() -> None:
        torch.empty(2**40, 2**40)

    for ask in (of_numpy, of_torch, beyond):
        with pytest.raises(RunFailed, match=r"^out of memory: sizes of"), explain_system_errors():
            ask()


def test_checkpoints_are_in_the_order_of_their_numbers_past_eight_digits(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 2):
        (tmp_path / f"step-{step:08d}.pt").touch()
    assert [checkpoint_step(path) for path in list_checkpoints(tmp_path)] == [2, 10**8 - 1, 10**8]


@pytest.mark.parametrize("key", ["seconds", "compute", "loss", "time"])
@pytest.mark.parametrize("value", ["Infinity", "NaN", "1" + "0" * 400])
def test_status_passes_over_rows_whose_numbers_are_none(tmp_path: Path, key, value) -> None:
    """A flipped bit can make them so, and the time that is left is computed from them."""
    row = {"step": 1, "stage": 0, "time": time.time(), "seconds": 1.0, "compute": 0.5}
    lost = json.dumps(row | {"step": 2, key: 0}).replace(f'"{key}": 0', f'"{key}": {value}')
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(row)}\n{lost}\n{'[' * 100_000}\n{{}}\n")
    with pytest.warns(UserWarning, match="left out line 3"):
        (found,) = status([tmp_path])
    assert (found.state, found.step, round(found.eta or 0)) == ("running", 1, 1)
    assert "0:00:01" in table([found])


def test_a_folder_without_locks_is_not_called_busy(tmp_path: Path, monkeypatch) -> None:
    for code, sentence in ((errno.ENOLCK, "cannot be locked: No"), (errno.EAGAIN, "another proc")):

        def refused(*_: object, code: int = code) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr("fcntl.lockf", refused)
        with pytest.raises(UserError, match=sentence), sole_writer(tmp_path):
            pass


def test_a_folder_for_checkpoints_that_takes_no_file_is_refused(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "checkpoints")
    assert list((tmp_path / "new" / "checkpoints").iterdir()) == []
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name in ("file", "link"):
        with pytest.raises(UserError, match=f"{name} cannot be written to: File exists"):
            check_writable(tmp_path / name)


def test_a_run_of_another_command_or_version_is_named_so(tmp_path: Path) -> None:
    """The flag that is not accepted is none that the user gave."""
    config = load_config(PretrainConfig, [], [f"--output.dir={tmp_path}"])
    saved = {"config": to_yaml(config) + "new_key: 3\n"}
    sentence = r"holds a run of another command, or of another version of mae-et: \S.*new_key"
    with pytest.raises(UserError, match=sentence):
        check_same_run(config, saved, finished=False)
    (tmp_path / "config.yaml").write_text(saved["config"])
    with pytest.raises(UserError, match=r"config\.yaml is damaged, or of another version of"):
        config_of(tmp_path)
    (tmp_path / "config.yaml").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"config\.yaml cannot be read"):
        check_same_run(config, None, finished=True)


def test_loader_processes_are_as_many_as_a_machine_can_start() -> None:
    for workers in (-1, 10**6):
        with pytest.raises(
            UserError, match=rf"efficiency\.num_workers must lie in .*, got {workers}$"
        ):
            EfficiencyConfig(num_workers=workers)


def test_dynamics_name_a_checkpoint_that_does_not_load(tmp_path: Path) -> None:
    (tmp_path / "step-00000001.pt").write_bytes(b"cut off")
    with pytest.raises(UserError, match=r"00001\.pt is damaged: .*; delete it to score the others"):
        score_checkpoint(DynamicsConfig(tmp_path), tmp_path / "step-00000001.pt", (8,))


def test_the_name_of_an_image_is_one_line_without_what_a_terminal_obeys(tmp_path: Path) -> None:
    (tmp_path / "red\x1b[31m\nline.png").write_bytes(b"")
    source = open_dataset(DataConfig(root=tmp_path / "..", train_split=tmp_path.name), "train")
    with pytest.raises(Unreadable, match=r"red\?\[31m\?line\.png: the file is empty$"):
        source[0]


def test_a_terminal_that_is_closed_asks_a_run_to_stop_but_not_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may be under nohup
    try:
        with stop_signals() as flag:
            os.kill(os.getpid(), signal.SIGHUP)
        assert flag.signal == signal.SIGHUP
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        with stop_signals() as flag:
            os.kill(os.getpid(), signal.SIGHUP)
        assert flag.signal is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_numbers_beyond_all_are_refused_in_a_plan(capsys) -> None:
    with pytest.raises(UserError, match="share must be positive, got 1e\\+308"):
        Curriculum((Stage(16, 1e308), Stage(32, 1e308)), 32, 8)
    for images in ("0", "-5", "9" * 400):
        assert main(["plan", f"--images={images}"]) == 2
        assert "images must lie in (0, 1e15), got" in capsys.readouterr().err
