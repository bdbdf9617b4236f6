"""User input in batch scripts stays one shell word, or is refused if no quotes can hold it."""

import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz.watch import nothing_runs
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_et import UserError
from mae_et.cli.main import main
from mae_et.cli.main import run as run_command
from slurm import squeue
from slurm.config import ClusterConfig
from slurm.events import read_events, record_event
from slurm.job import Job
from slurm.launcher import Launcher
from slurm.private import make_private
from slurm.run_status import status
from slurm.squeue import job_states
from slurm.status_table import table

HOSTILE = [
    "a b", "a'b", 'a"b', "$(touch canary)", "`touch canary`", "a; touch canary", "a|touch canary",
    "a && touch canary", "a\ntouch canary", "a\r\ntouch canary", "a\ttouch canary", "-x",
    "--wrap=touch canary", "$HOME", "*", "~", "#", "!!", "\\", "a\\", "\x1b[2J", "é", "a:b", "%j",
    "a\x00b", "a\u2028touch canary", "{a,b}", "<x", ">canary", "&",
]  # fmt: skip
REAL_PYTHON = sys.executable
GONE = "99999999"  # no process has such a number
STUB = """#!/bin/sh
printf '%s\\0' "$@" >> "{words}"
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch) -> Path:
    """A folder in which srun and Python only record their arguments."""
    for name in ("srun", "python"):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(STUB.format(words=tmp_path / f"{name}.words"))
        path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    return tmp_path


def run(script: str, place: Path) -> list[str]:
    """Run a batch script; return the arguments of srun."""
    (place / "srun.words").unlink(missing_ok=True)
    environment = {"PATH": f"{place / 'bin'}:/usr/bin:/bin", "HOME": "/nowhere"}
    done = subprocess.run(
        ["bash"], input=script, text=True, capture_output=True, env=environment, cwd=place
    )
    assert done.returncode == 0, done.stderr
    assert not list(place.rglob("canary"))
    return (place / "srun.words").read_text().split("\0")[:-1]


def launcher(config: ClusterConfig, place: Path, root: str = "run", name: str = "job") -> Launcher:
    folder = place / root
    for each in ("slurm", "code"):
        (folder / each).mkdir(parents=True, exist_ok=True)
    return Launcher(config, folder / "slurm", folder / "code", name, [Job(run_command, [], folder)])


def directives(script: str) -> dict[str, str]:
    """Return the #SBATCH options, parsed as sbatch does: quoted words up to the end of a line."""
    lines = [line for line in script.split("\n") if line.startswith("#SBATCH ")]
    words = [shlex.split(line.removeprefix("#SBATCH ")) for line in lines]
    assert all(len(each) == 1 for each in words), lines
    return dict(word[0].removeprefix("--").partition("=")[::2] for word in words)


def holds(word: str, place: Path) -> None:
    """Check each place of a batch script that holds user input."""
    settings = {
        "name": word, "partition": word, "account": word, "qos": word, "constraint": word,
        "exclude": word, "mail_user": word, "mail_type": word, "extra": {"comment": word},
        "srun": [word], "network_interface": word, "dependency": word,
    }  # fmt: skip
    if not word.isprintable():
        with pytest.raises(UserError, match="control character"):
            ClusterConfig(**settings)
        return
    config = ClusterConfig(**settings)
    script = launcher(config, place, name=word).script()
    options = directives(script)
    for key in ("job-name", "partition", "account", "qos", "constraint", "exclude", "comment",
                "mail-user", "mail-type", "dependency"):  # fmt: skip
        assert options[key] == word
    exports = [line for line in script.split("\n") if "SOCKET_IFNAME=" in line]
    assert [shlex.split(line)[1] for line in exports] == [
        f"NCCL_SOCKET_IFNAME={word}", f"GLOO_SOCKET_IFNAME={word}"
    ]  # fmt: skip
    words = run(script, place)
    assert words[words.index("--kill-on-bad-exit=1") + 1] == word


@pytest.mark.parametrize("word", HOSTILE, ids=ascii)
def test_hostile_word_stays_one_word_or_is_refused(word: str, place: Path) -> None:
    holds(word, place)


@given(st.text(st.sampled_from(" '\"$()`;&|<>\\\n\r\t#!*?~%{}[]=-aé\u2028\x00"), min_size=1))
@settings(max_examples=40, derandomize=True)
def test_any_word_stays_one_word_or_is_refused(place: Path, word: str) -> None:
    holds(word, place)


@pytest.mark.parametrize("name", [*HOSTILE, "plain"], ids=ascii)
def test_hostile_run_folder_stays_one_word_or_is_refused(name: str, place: Path) -> None:
    """Its path is passed to srun, Python, PYTHONPATH and sbatch's file name patterns."""
    from slurm.preflight import check_path

    root = Path(name)
    bad = [each for each in name if each in ":\\'\"" or not each.isprintable()]
    if bad:
        with pytest.raises(UserError, match="which SLURM or Python would misread"):
            check_path(root)
        return
    check_path(root)
    script = launcher(ClusterConfig(), place, name).script()
    folder = str(place / name / "slurm")
    words = run(script, place)
    assert words[-1] == folder
    assert words[words.index("--output") + 1] == f"{folder}/%j_%t_log.out"
    assert directives(script)["output"] == f"{folder}/%j_0_log.out"
    # The script's last lines run when srun fails: the same words then reach `slurm.retry`.
    failing = script.replace("\nsrun ", "\nfalse ")
    (place / "python.words").unlink(missing_ok=True)
    environment = {"PATH": f"{place / 'bin'}:/usr/bin:/bin", "HOME": "/nowhere"}
    subprocess.run(["bash"], input=failing, text=True, env=environment, cwd=place)
    said = (place / "python.words").read_text().split("\0")[:-1]
    assert said[:2] == ["-m", "slurm.retry"]
    assert said[2].startswith(f"{folder}/runs-")
    assert said[3:] == ["1", "3"]


def test_dry_run_prints_a_valid_script_for_any_arguments(place: Path, capsys) -> None:
    """Users pipe it into a file: the description of the command stays a comment."""
    root = "--data.root=x\ntouch canary; $(touch canary)"
    flags = ["--data.name=cifar10", "--executor=slurm", "--output.dir=run", "--dry-run"]
    assert main(["submit", "pretrain", root, *flags]) == 0
    comments = [
        line for line in capsys.readouterr().out.split("\n") if line.startswith("# mae-et pretrain")
    ]
    assert len(comments) == 1
    assert "touch canary" in comments[0]


@pytest.mark.parametrize("key", ["a b", "x\ntouch canary", "-x", "", "a=b", "a;b", "é"])
def test_sbatch_option_must_be_a_name(key: str) -> None:
    with pytest.raises(UserError, match=r"not an sbatch option"):
        ClusterConfig(extra={key: "1"})


def test_folder_of_pickled_jobs_is_writable_by_its_user_only(tmp_path: Path, monkeypatch) -> None:
    """Whoever writes a pickle there can run code as this user."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    folder.chmod(0o777)
    make_private(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(UserError, match="belongs to another user"):
        make_private(folder)


def test_linked_folder_of_pickled_jobs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "slurm").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="slurm is a link"):
        make_private(tmp_path / "run" / "slurm")


@pytest.mark.skipif(os.getuid() != 0, reason="switches to another user")
@pytest.mark.parametrize("mode", [0o2775, 0o777, 0o1777])
def test_other_users_cannot_replace_the_folder_of_pickled_jobs(tmp_path: Path, mode: int) -> None:
    """In a run folder that a group, or everybody, could write to."""
    for parent in (tmp_path, *tmp_path.parents):
        if parent.owner() == "root" and parent != Path("/tmp"):
            parent.chmod(parent.stat().st_mode | 0o011)
    run = tmp_path / "run"
    run.mkdir()
    os.chown(run, 0, 1234)
    run.chmod(mode)
    make_private(run / "slurm")
    assert stat.S_IMODE(run.stat().st_mode) & 0o1022 == 0o1020  # its group may add files
    (run / "slurm" / "7_submitted.pkl").write_text("ours")
    attack = f"""if True:
        import os
        os.setgroups([1234]); os.setgid(1234); os.setuid(65534)
        os.stat({str(run / "slurm")!r})
        os.rename({str(run / "slurm")!r}, {str(run / "old")!r})
    """
    done = subprocess.run([REAL_PYTHON, "-c", attack], capture_output=True, text=True)
    assert "PermissionError" in done.stderr
    assert "run/old'" in done.stderr  # the rename, not the stat before it
    assert (run / "slurm" / "7_submitted.pkl").read_text() == "ours"


@pytest.mark.skipif(os.getuid() != 0, reason="gives folders to another user")
@pytest.mark.parametrize("foreign", ["slurm", "code"])
@pytest.mark.parametrize("deleted", [False, True])
def test_job_ends_if_its_run_folder_was_deleted_or_replaced_by_another_user(
    place: Path, foreign: str, deleted: bool
) -> None:
    """Without the copied code, it would run the code that is installed by then."""
    job = launcher(ClusterConfig(), place, root="run $(touch canary)")
    script = job.script()
    assert run(script, place)
    folder = job.folder.parent / foreign
    shutil.rmtree(folder) if deleted else os.chown(folder, 65534, 65534)
    with pytest.raises(AssertionError, match=rf"{foreign} was deleted, or replaced by another"):
        run(script, place)
    assert not (place / "srun.words").exists()


# --- status: it reads files, runs SLURM's programs, and prints ------------------------------------


def test_job_ids_from_files_are_validated_before_calling_slurm(tmp_path: Path) -> None:
    with nothing_runs(tmp_path):
        assert job_states(["-x", "--help", "7; touch canary", "$(x)", "DEBUG_1", "7\n"]) == {}


def test_status_reads_only_logs_of_its_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(squeue, "run_program", lambda *_: None)
    run = tmp_path / "runs" / "one"
    (run / "slurm").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    for folder in (tmp_path / "secret", run / "slurm"):
        (folder / f"{GONE}_0_log.err").write_text(f"from {folder.name}\x1b[2J\n")
    said = []
    for logs in (tmp_path / "secret", run / "slurm" / ".." / ".." / ".." / "secret", run / "slurm"):
        record_event(run, "submitted", job=GONE, logs=str(logs), executor="local")
        record_event(run, "started", job=GONE)
        said.append(status([run])[0].error)
    assert said == ["", "", "from slurm\x1b[2J"]
    assert "\x1b" not in table(status([run]))  # a terminal would obey it


def test_malformed_and_half_written_events_are_skipped(tmp_path: Path) -> None:
    record_event(tmp_path, "started", job="1")
    with (tmp_path / "slurm" / "events.jsonl").open("a") as file:
        for line in ({"event": 3}, {"event": "x"}, [], {"event": "x", "time": 1, "job": ["-x"]}):
            file.write(json.dumps(line) + "\n")
        file.write("[" * 100_000 + '\n{"event": "fin')
    assert [event["event"] for event in read_events(tmp_path)] == ["started"]


def test_status_opens_no_port(tmp_path: Path, capsys) -> None:
    record_event(tmp_path, "started", job="1")
    with nothing_runs(tmp_path):  # to bind a socket is one of the things that it sees
        assert main(["status", str(tmp_path)]) == 0
    assert str(tmp_path) in capsys.readouterr().out
