"""Truncated or corrupted files are detected, or load unchanged."""

import errno
import json
import math
import os
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from launch import QUIET, equal, same_weights
from tiny_run import IMAGES
from train_state import state

from mae_et import UserError, pretrain
from mae_et.checkpoints import store
from mae_et.checkpoints.store import (
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    rename_damaged_after,
    save_checkpoint,
)
from mae_et.checkpoints.weight_files import read_weight_file
from mae_et.checkpoints.writers.tensor_files import export_encoder
from mae_et.config.model import ModelConfig
from mae_et.io.metrics_file import read_metrics

Read = Callable[[Path], object]


@contextmanager
def flipped(path: Path, place: int, bit: int) -> Iterator[None]:
    """Flip a bit of a file, and flip it back."""
    descriptor = os.open(path, os.O_RDWR)
    before = os.pread(descriptor, 1, place)
    os.pwrite(descriptor, bytes([before[0] ^ (1 << bit)]), place)
    try:
        yield
    finally:
        os.pwrite(descriptor, before, place)
        os.close(descriptor)


def outcome(read: Read, path: Path, good: object) -> str:
    try:
        found = read(path)
    except ValueError:
        return "noticed"
    return "the same" if equal(found, good) else "WRONG"


def sweep(path: Path, read: Read, flips: int) -> Counter[str]:
    """Flip random bits one at a time, half of them at the file's ends, and read it each time."""
    good, size, chance = read(path), path.stat().st_size, random.Random(0)
    seen: Counter[str] = Counter()
    for number in range(flips):
        place = chance.randrange(size)
        if number % 2:  # headers, directories and comments lie there
            place = chance.choice([chance.randrange(2000), size - 1 - chance.randrange(15_000)])
        with flipped(path, place, chance.randrange(8)):
            seen[outcome(read, path, good)] += 1
    return seen


def checkpoint(folder: Path) -> Path:
    return save_checkpoint(folder, state(1).to_dict(), "seed: 0", {"plan": 1})


def encoder(folder: Path) -> Path:
    export_encoder(state(1).model.encoder, folder / "encoder.safetensors", ModelConfig())
    return folder / "encoder.safetensors"


@pytest.mark.parametrize("flips", [300, pytest.param(20_000, marks=pytest.mark.faults)])
@pytest.mark.parametrize(
    ("write", "read"),
    [(checkpoint, load_checkpoint), (checkpoint, read_weight_file), (encoder, read_weight_file)],
    ids=["checkpoint", "checkpoint-by-its-path", "encoder"],
)
def test_flipped_bits_are_detected_or_harmless(tmp_path, write, read, flips: int) -> None:
    seen = sweep(write(tmp_path), read, flips)
    print(f"\n{flips} flipped bits: {dict(seen)}")
    assert seen["WRONG"] == 0
    assert seen["noticed"] > 0.99 * flips


@pytest.mark.parametrize("cuts", [100, pytest.param(5_000, marks=pytest.mark.faults)])
@pytest.mark.parametrize(
    ("write", "read"), [(checkpoint, load_checkpoint), (encoder, read_weight_file)],
    ids=["checkpoint", "encoder"],
)  # fmt: skip
def test_truncated_file_is_detected_at_any_length(tmp_path, write, read, cuts: int) -> None:
    path = write(tmp_path)
    content, chance = path.read_bytes(), random.Random(1)
    # Each of the last bytes by itself: the checksum of a checkpoint lies there.
    places = [*range(len(content) - cuts // 2, len(content)), 0, 1, 7, 8]
    places += [chance.randrange(len(content)) for _ in range(cuts - len(places))]
    seen: Counter[str] = Counter()
    for place in sorted(places, reverse=True):
        os.truncate(path, place)
        seen[outcome(read, path, None)] += 1
    print(f"\ncut off at {len(places)} places: {dict(seen)}")
    assert seen == {"noticed": len(places)}


def test_damaged_file_given_by_path_raises_a_user_error(tmp_path) -> None:
    for path in (checkpoint(tmp_path), encoder(tmp_path)):
        place = path.stat().st_size // 2
        with flipped(path, place, 1), pytest.raises(UserError) as error:
            read_weight_file(path)
        assert str(error.value) == f"{path} is damaged: it does not match its checksum"


@pytest.mark.faults
def test_damaged_newest_checkpoint_falls_back_to_the_previous_one(tiny, tmp_path) -> None:
    """At 20 places in the file, with a warning, to the same result bit for bit."""
    clean = pretrain(tiny(*QUIET, "--output.keep_last=9", f"--output.dir={tmp_path / 'clean'}"))
    paths = list_checkpoints(clean / "checkpoints")
    contents = {path.name: path.read_bytes() for path in paths[:3]}
    chance = random.Random(2)
    for number in range(20):
        folder = tmp_path / f"run-{number}"
        (folder / "checkpoints").mkdir(parents=True)
        for name, content in contents.items():
            (folder / "checkpoints" / name).write_bytes(content)
        newest = folder / "checkpoints" / paths[2].name
        size = newest.stat().st_size
        if number % 2:
            os.truncate(newest, chance.randrange(size))
        else:
            data = bytearray(newest.read_bytes())
            data[chance.randrange(size)] ^= 1 << chance.randrange(8)
            newest.write_bytes(data)
        with pytest.warns(
            UserWarning, match=r"step-00000015\.pt .*; falling back to the one before"
        ):
            done = pretrain(tiny(*QUIET, f"--output.dir={folder}"))
        assert same_weights(done, clean)
        assert newest.with_name(f"{newest.name}.damaged").exists()


def test_run_without_a_loadable_checkpoint_is_refused(tiny) -> None:
    """Without changing the folder, so that a copy of the checkpoint can be restored."""
    config = tiny(*QUIET)
    folder = pretrain(config, stop_after_step=5)
    (path,) = list_checkpoints(folder / "checkpoints")
    whole, record = path.read_bytes(), (folder / "metrics.jsonl").read_bytes()
    path.write_bytes(whole[:5000])
    with (
        pytest.warns(UserWarning, match="there is no earlier one"),
        pytest.raises(UserError, match=r"none of the 1 checkpoints in \S+ loads; nothing was"),
    ):
        pretrain(config)
    assert (folder / "metrics.jsonl").read_bytes() == record
    assert path.read_bytes() == whole[:5000]
    path.write_bytes(whole)
    pretrain(config, stop_after_step=6)
    assert newest_checkpoint(folder / "checkpoints")["step"] == 6


def test_temporarily_unreadable_checkpoint_is_not_marked_damaged(tmp_path, monkeypatch) -> None:
    """A lost file server or missing permission never discards a checkpoint."""
    path = tmp_path / "step-00000001.pt"
    path.write_bytes(b"")
    for code in (errno.EACCES, errno.ESTALE):

        def refused(path: Path, code: int = code) -> bool:
            raise OSError(code, "refused", str(path))

        monkeypatch.setattr(store, "check_archive", refused)
        with pytest.raises(OSError, match="refused"):
            newest_checkpoint(tmp_path)
        with pytest.raises(OSError, match="refused"):
            rename_damaged_after(tmp_path, 0)
    assert list(tmp_path.iterdir()) == [path]


# --- the record -----------------------------------------------------------------------------------


def test_damaged_rows_are_skipped_with_a_warning(tmp_path) -> None:
    lines = [f'{{"step": {step}, "loss": 0.5}}'.encode() for step in range(1, 9)]
    lines[2] = lines[2].replace(b"{", b"[")
    lines[4] = b"\0" * 30  # what a machine that lost its power leaves of a file
    lines[5] = lines[5].replace(b"loss", b"l\xffss")
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b'\n{"step": 9, "lo')
    with pytest.warns(UserWarning, match=r"metrics\.jsonl is damaged: skipped line 3, 5, 6$"):
        rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 4, 7, 8]


@pytest.mark.parametrize("times", [2, pytest.param(20, marks=pytest.mark.faults)])
def test_damaged_metrics_file_does_not_stop_a_run(tiny, times: int) -> None:
    """Training never reads numbers from it; the damaged encoder is exported again."""
    config = tiny("--output.keep_last=9")  # with TensorBoard, which reads every number again
    folder = pretrain(config)
    record, checkpoints = folder / "metrics.jsonl", folder / "checkpoints"
    good, chance = record.read_bytes(), random.Random(3)
    weights = newest_checkpoint(checkpoints)
    for number in range(times):
        (folder / "results.json").unlink()
        list_checkpoints(checkpoints)[-1].unlink()  # the last steps are done again
        damaged = bytearray(good)
        for _ in range(20):
            damaged[chance.randrange(len(good))] ^= 1 << chance.randrange(8)
        record.write_bytes([damaged, b"", b"\0" * len(good)][number % 3])
        (folder / "encoder.safetensors").write_bytes(b"damaged")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pretrain(config)
        assert (folder / "results.json").exists()
        assert equal(newest_checkpoint(checkpoints)["model"], weights["model"])
        assert read_weight_file(folder / "encoder.safetensors")


def test_damaged_rows_and_images_do_not_stop_a_resumed_run(tiny) -> None:
    """A flipped bit in a name or a number leaves JSON, and a row that TensorBoard cannot show."""
    config = tiny(IMAGES)
    folder = pretrain(config, stop_after_step=13)  # with an image
    record, (image,) = folder / "metrics.jsonl", (folder / "reconstructions").iterdir()
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    harm = [
        {"time": None}, {"stage": "0"}, {"bandwidth": []}, {"equivalent_epochs": math.inf},
        {"loss": "1.1"}, {"skipped_updates": 10**400},
    ]  # fmt: skip
    assert len(rows) > len(harm)
    lines = [json.dumps(row | lost) for row, lost in zip(rows, harm, strict=False)]
    record.write_text("\n".join([*lines, json.dumps(rows[-1])]) + "\n")
    (folder / "unreadable.jsonl").write_text('{"step": 1}\n{"step": 2, "sample": 4000}\n')
    (folder / "scores.jsonl").write_text('{"step": 1, "time": 0.5, "top1": "x"}\n{}\n')
    image.write_bytes(image.read_bytes()[:50])
    image.with_name("step-last.png").write_bytes(b"")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pretrain(config, stop_after_step=14)
    said = [str(each.message) for each in caught]
    assert any(f"{record} is damaged: skipped line 1, 2, 3, 4, 5, ..." in each for each in said)
    assert any(f"{image} is damaged: skipped in TensorBoard" in each for each in said)
    assert [row["step"] for row in read_metrics(folder)] == [13, 14]


def test_damaged_results_are_rewritten_from_the_last_checkpoint(tiny) -> None:
    config = tiny(*QUIET, "--curriculum.epochs=1")
    folder = pretrain(config)
    results = folder / "results.json"
    expected = json.loads(results.read_text())
    del expected["provenance"]["time"]
    results.write_text('{"loss": ')
    with pytest.warns(UserWarning, match=r"results\.json cannot be read: .*; it is written again"):
        pretrain(config)
    again = json.loads(results.read_text())
    del again["provenance"]["time"]
    assert again == expected
    results.write_text("")
    for path in list_checkpoints(folder / "checkpoints"):
        path.unlink()
    with pytest.raises(UserError, match=r"results\.json cannot be read"):
        pretrain(config)


def test_deleted_encoder_is_exported_again_from_the_last_checkpoint(tiny) -> None:
    config = tiny(*QUIET, "--curriculum.epochs=1")
    encoder = pretrain(config) / "encoder.safetensors"
    expected = encoder.read_bytes()
    encoder.unlink()
    pretrain(config)
    assert encoder.read_bytes() == expected


def test_run_without_a_checkpoint_restarts_with_a_warning(tiny) -> None:
    config = tiny(*QUIET, "--curriculum.epochs=1")
    folder = pretrain(config)
    steps = [row["step"] for row in read_metrics(folder)]
    (folder / "results.json").unlink()
    for path in list_checkpoints(folder / "checkpoints"):
        path.unlink()
    with pytest.warns(UserWarning, match=f"metrics up to step {steps[-1]} but no checkpoint"):
        pretrain(config)
    assert [row["step"] for row in read_metrics(folder)] == steps


def test_only_temporary_files_of_a_killed_writer_are_deleted(tiny) -> None:
    config = tiny(*QUIET, "--curriculum.epochs=1")
    folder = config.output.dir
    left = [folder / ".config.yaml.17796.tmp", folder / "reconstructions/.step-00000001.png.5.tmp",
            folder / "checkpoints/.step-00000001.pt.5.tmp"]  # fmt: skip
    mine = [folder / ".notes.tmp", folder / "notes.5.tmp"]
    for path in (*left, *mine):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    pretrain(config, stop_after_step=0)  # before anything is written that may need the space
    assert [path for path in (*left, *mine) if path.exists()] == mine
