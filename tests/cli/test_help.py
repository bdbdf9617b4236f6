"""`--help`, `--help all` and completion in a shell."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mae_et.cli.arguments import parser_of
from mae_et.cli.bench import NAMES
from mae_et.cli.commands import COMMANDS
from mae_et.cli.main import main
from mae_et.config.keys import marked_keys


def shown_keys(capsys, *words: str) -> list[str]:
    """Return the keys that a command's help describes."""
    assert main([*words]) == 0
    return re.findall(r"^  --([\w.]+)", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("command", ["pretrain", "finetune", "search"])
def test_help_describes_the_common_keys_and_help_all_every_key(command: str, capsys) -> None:
    common = shown_keys(capsys, command, "--help")
    assert set(common) == {"config", *marked_keys(COMMANDS[command].config, "common")}
    assert len(common) <= 26
    every = shown_keys(capsys, command, "--help", "all")
    keys = {
        action.dest for action in parser_of(COMMANDS[command])._actions if action.option_strings
    }
    assert set(common) < set(every)
    assert keys - {"help"} == set(every)


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_completion_knows_commands_keys_and_choices(tmp_path: Path, capsys) -> None:
    assert main(["completion", "bash"]) == 0
    (tmp_path / "completion").write_text(capsys.readouterr().out)
    script = """
        source "$1"; shift
        COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_mae_et; echo "${COMPREPLY[@]}"
    """
    for words, expected in {
        ("pre",): "preview pretrain predict prepare",
        ("pretrain", "--model.targ"): "--model.target",
        ("pretrain", "--model.target", "n"): "norm_pix",
        ("supervised", "--model.backb"): "--model.backbone",
        ("knn", "--data.roo"): "--data.root",
        ("pretrain", "--probe.data.root", f"{tmp_path}/com"): f"{tmp_path}/completion",
        ("pretrain", "--efficiency.compile", ""): "true false auto",
        ("submit", "lin"): "linear-probe",
        ("submit", "pretrain", "--partit"): "--partition",
        ("submit", "knn", "--executor", "l"): "local",
        ("submit", "pretrain", "--model.targ"): "--model.target",
        ("submit", "bench", "node", "--sec"): "--seconds",
        ("bench", ""): " ".join(NAMES),
        ("bench", "node", "--model.target", "n"): "norm_pix",
        ("status", f"{tmp_path}/com"): f"{tmp_path}/completion",
    }.items():
        done = subprocess.run(
            ["bash", "-c", script, "bash", tmp_path / "completion", "mae-et", *words],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.split() == expected.split(), words
    assert main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("#compdef mae-et")
    assert main(["completion", "fish"]) == 2
    assert "completion needs one of bash, zsh, got 'fish'" in capsys.readouterr().err
