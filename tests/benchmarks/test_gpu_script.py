"""`benchmarks/gpu.sh` runs its parts in order, and leaves only results; Python is a stub."""

import os
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STUB = """#!/bin/bash
echo "$*" >>"$CALLS"
after() { # FLAG WORDS...: the word after a flag
  local before= word
  for word in "${@:2}"; do [ "$before" = "$1" ] && echo "$word"; before=$word; done
}
case " $* " in
  " - "*) mkdir -p "$2"/{train,val}/dark ;;
  *".variants $HANGS "*) exec sleep 1000 ;;
  *.variants*) mkdir -p "$(after --output.dir "$@")" ;;
  *" bench node "*) echo "{}" >"$(after --save "$@")" ;;
  *" quality "*)
    folder=$(after --folder "$@")
    if [ "$HANGS" = arms ]; then # saves on SIGTERM
      trap 'sleep 0.5; touch "$folder/saved"; exit 1' TERM
      mkdir -p "$folder"
      while :; do sleep 0.05; done
    fi
    echo "{}"
    ;;
esac
"""
PARTS = {
    "gpu_goals": "goals",
    "variants default": "default",
    "variants memory": "memory",
    "variants short": "short",
    "variants replay": "replay",
    "variants mixed": "mixed",
    "bench node": "node",
    "-m pytest": "tests",
    "bench quality": "arms",
}


@pytest.fixture
def script(tmp_path: Path) -> list[str]:
    (tmp_path / "python").write_text(STUB)
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "tmp").mkdir()
    return [str(ROOT / "benchmarks" / "gpu.sh"), str(tmp_path / "out")]


def environment(tmp_path: Path, hangs: str = "none") -> dict[str, str]:
    own = {"SMOKE": "1", "ARMS": "plain", "PYTHON": str(tmp_path / "python"), "HANGS": hangs}
    places = {"CALLS": str(tmp_path / "calls"), "TMPDIR": str(tmp_path / "tmp")}
    return os.environ | own | places


def calls(tmp_path: Path) -> list[str]:
    """Return the parts that ran, in order."""
    lines = (tmp_path / "calls").read_text().splitlines()
    return [part for line in lines for words, part in PARTS.items() if words in line]


def test_parts_run_in_order_and_once(tmp_path: Path, script: list[str]) -> None:
    subprocess.run(script, env=environment(tmp_path), capture_output=True)
    before = ["default", "goals", "node", "goals", "memory", "goals", "replay", "goals"]
    after = ["tests", "goals", "short", "goals", "mixed", "goals", "arms"]
    assert calls(tmp_path) == ["goals", *before, *after]
    out = tmp_path / "out"
    assert {each.name for each in out.iterdir()} == {"node.json", "quality.json", "log.txt"}
    assert not list((tmp_path / "tmp").iterdir())
    ended = ", ".join(
        f'"{name}": {{"ended": true}}' for name in ("default", "memory", "replay", "short")
    )
    (out / "run.json").write_text(f'{{{ended}, "mixed": {{"ended": false}}}}')
    (tmp_path / "calls").unlink()
    subprocess.run(script, env=environment(tmp_path), capture_output=True)
    assert calls(tmp_path) == ["goals", "tests", "goals", "mixed", "goals", "arms"]


def test_script_that_is_stopped_ends_at_once_and_leaves_what_it_has(
    tmp_path: Path, script: list[str]
) -> None:
    process = subprocess.Popen(script, env=environment(tmp_path, "mixed"), stdout=subprocess.PIPE)
    patience = time.monotonic() + 60
    while not (tmp_path / "calls").exists() or "mixed" not in calls(tmp_path):
        assert time.monotonic() < patience
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert {each.name for each in (tmp_path / "out").iterdir()} == {"node.json", "log.txt"}
    assert not list((tmp_path / "tmp").iterdir())


def test_an_arm_that_is_stopped_saves_before_it_is_packed_and_is_unpacked(
    tmp_path: Path, script: list[str]
) -> None:
    process = subprocess.Popen(script, env=environment(tmp_path, "arms"), stdout=subprocess.PIPE)
    patience = time.monotonic() + 60
    while not list((tmp_path / "tmp").glob("*/quality")):
        assert time.monotonic() < patience
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    for _ in range(2):
        with tarfile.open(tmp_path / "out" / "state.tar") as packed:
            assert "quality/saved" in packed.getnames()
        (tmp_path / "calls").unlink()
        subprocess.run(script, env=environment(tmp_path), capture_output=True)
        assert calls(tmp_path)[-1] == "arms"
