"""Searches that are refused, in a sentence that names the key."""

from pathlib import Path

import pytest
from searches import SMALL, pretend

from mae_et import UserError
from mae_et.cli.main import main
from mae_et.search import driver
from mae_et.search.driver import search


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--search.candidates=[20,32]"], "search.candidates: 20 is not a multiple of the patch"),
        (["--search.candidates=[32]"], "search.candidates needs at least two"),
        (["--search.finetune=0"], "search.finetune must lie in"),
        (["--search.stages=0"], "search.stages must be positive"),
        (["--search.strategy=greedy", "--search.stages=1"], "at least 2: greedy"),
        (["--search.objective=accuracy"], "search.objective must be knn, linear or"),
        (["--search.objective=nowhere:function"], "nowhere:function is not found"),
        (["--search.objective=json:nothing"], "json:nothing is not found"),
        (["--search.cluster=nowhere"], "there is no cluster 'nowhere'"),
        (
            ["--optim.warmup_fraction=0.9"],
            "optim.warmup_fraction 0.9 is longer than the first of the 3 stages",
        ),
        (["--search.epochs=0.01"], "less than one step"),
        (
            ["--data.synthetic_train=12", "--search.held_out=0.01"],
            "too few to hold out a share of 0.01",
        ),
        (["--search.magnitude=11"], "search.magnitude must lie in"),
    ],
)
def test_user_errors_name_the_key_before_training(
    tiny_yaml: Path, tmp_path: Path, flags: list[str], sentence: str, capsys
) -> None:
    folder = tmp_path / "search"
    command = ["search", f"--config={tiny_yaml}", f"--output.dir={folder}", *SMALL, *flags]
    assert main(command) == 2
    assert sentence in capsys.readouterr().err
    assert not (folder / "trials").exists()


def test_a_config_file_cannot_name_an_objective_function(
    tiny_yaml: Path, tmp_path: Path, capsys
) -> None:
    tiny_yaml.write_text(f"{tiny_yaml.read_text()}search: {{objective: 'json:loads'}}\n")
    command = ["search", f"--config={tiny_yaml}", f"--output.dir={tmp_path / 's'}", *SMALL]
    assert main(command) == 2
    assert "names code, which a config may not" in capsys.readouterr().err


def test_another_search_in_the_folder_is_refused_unless_only_trials_grow(
    small, monkeypatch
) -> None:
    flags = ["--search.strategy=bayes", "--search.prune_from=null", "--search.trials=2"]
    search(small(*flags), lambda folder: 1.0, pretend)
    with pytest.raises(UserError, match=r"holds another search: search\.stages was 3 and is now 4"):
        search(small(*flags, "--search.stages=4"), lambda folder: 1.0, pretend)
    found = search(small(*flags, "--search.trials=5"), lambda folder: 1.0, pretend)
    assert found["trials"] == 5
    monkeypatch.setattr(driver, "open_dataset", lambda *_: range(41))
    with pytest.raises(UserError, match="holds another search: images was 40 and is now 41"):
        search(small(*flags), lambda folder: 1.0, pretend)


def test_a_search_in_the_folder_of_a_run_is_refused(small) -> None:
    """Its config reads as a search's, and would be replaced, as its results."""
    config = small()
    config.output.dir.mkdir()
    (config.output.dir / "plan.json").write_text("{}")
    with pytest.raises(UserError, match="holds a run, whose config and results"):
        search(config, lambda folder: 1.0, pretend)
    assert not (config.output.dir / "config.yaml").exists()


def test_a_nan_objective_is_an_error(small, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "mine.py").write_text("def score(folder):\n    return float('nan')\n")
    monkeypatch.chdir(tmp_path)
    command = ["search", f"--config={tmp_path / 'tiny.yaml'}", "--output.dir=s", *SMALL]
    assert main([*command, "--search.objective=mine:score", "--curriculum.epochs=4"]) == 1
    assert "search.objective returned nan" in capsys.readouterr().err
