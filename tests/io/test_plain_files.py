"""Text and JSON files of a run folder: read, or refused in a sentence."""

import os
import signal
from pathlib import Path

import pytest

from mae_et import UserError
from mae_et.cli.main import main
from mae_et.io.atomic import write_text_atomically
from mae_et.io.plain_files import append_line, read_mapping, read_text


def test_text_and_json_objects_are_read_or_refused(tmp_path: Path) -> None:
    write_text_atomically(tmp_path / "a.json", '{"a": 1}')
    assert read_mapping(tmp_path / "a.json") == {"a": 1}
    for content in (b"[1]", b"{", b"\xff", b"[" * 100_000):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.json"):
            read_mapping(tmp_path / "a.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_text(tmp_path / "gone")


def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"cannot be read: .*not a regular file"):
        read_text(tmp_path / "pipe")
    with pytest.raises(OSError, match="No such device"):
        append_line(tmp_path / "pipe", "{}\n")


@pytest.mark.parametrize("name", ["metrics.jsonl", "scores.jsonl", "plan.json", "config.yaml",
                                  "results.json", "slurm/events.jsonl"])  # fmt: skip
def test_commands_that_read_run_folders_wait_for_no_pipe(place: Path, name: str) -> None:
    def still_waiting(*_: object) -> None:
        raise AssertionError(f"it waits for {name}")

    run = place / "run"
    (run / "slurm").mkdir(parents=True)
    (run / "metrics.jsonl").touch()
    (run / "config.yaml").write_text((place / "tiny.yaml").read_text())
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    before = signal.signal(signal.SIGALRM, still_waiting)
    signal.alarm(30)
    try:
        for command in (["status"], ["compare"], ["report", "--output=r.html"]):
            assert main([command[0], "run", *command[1:]]) in {0, 2}
        assert main(["plan", "--config=tiny.yaml", f"--throughput={run / name}"]) == 2
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_lines_are_appended_to_the_record_itself_and_to_no_link(
    tmp_path: Path, monkeypatch
) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda record: flushed.append(os.fstat(record).st_size))
    (tmp_path / "link").symlink_to(tmp_path / "record")
    for line in ("1\n", "2\n"):
        append_line(tmp_path / "record", line)
    with pytest.raises(UserError, match="link is a link; delete it"):
        append_line(tmp_path / "link", "3\n")
    assert (tmp_path / "record").read_text() == "1\n2\n"
    assert flushed == [2, 4]
