"""Which runs may resume from a folder."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from mae_et import PretrainConfig, UserError
from mae_et.checkpoints.run_config import config_of_run
from mae_et.config.efficiency import EfficiencyConfig
from mae_et.config.files import load_config, to_yaml
from mae_et.runtime.console import notify
from mae_et.training.resume.same_run import check_same_run
from mae_et.version import __version__


def test_config_of_another_command_or_version_is_refused(tmp_path: Path) -> None:
    """The error does not blame a flag that the user never gave."""
    config = load_config(PretrainConfig, [], [f"--output.dir={tmp_path}"])
    saved = {"config": to_yaml(config) + "new_key: 3\n"}
    sentence = r"holds a run of another command, or of another version of mae-et: \S.*new_key"
    with pytest.raises(UserError, match=sentence) as same_version:
        check_same_run(config, saved, finished=False)
    assert "wrote this config" not in str(same_version.value)
    later = {"config": saved["config"].replace(f"# mae-et {__version__}\n", "# mae-et 9.0.0\n")}
    sentence += rf" \(mae-et 9\.0\.0 wrote this config; this is {__version__}\); give"
    with pytest.raises(UserError, match=sentence):
        check_same_run(config, later, finished=False)
    (tmp_path / "later.yaml").write_text(later["config"])
    with pytest.raises(UserError, match=r"no key new_key.*mae-et 9\.0\.0 wrote"):
        load_config(PretrainConfig, tmp_path / "later.yaml")
    (tmp_path / "config.yaml").write_text(saved["config"])
    with pytest.raises(UserError, match=r"config\.yaml is damaged, or of another version of"):
        config_of_run(tmp_path)
    (tmp_path / "config.yaml").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"config\.yaml cannot be read"):
        check_same_run(config, None, finished=True)


@pytest.mark.parametrize("line", ["  new_key: 3", "  precision: fp4"])
def test_keys_of_another_version_that_decide_no_numbers_are_skipped(
    tmp_path: Path, capsys, line: str
) -> None:
    config = load_config(PretrainConfig, [], [f"--output.dir={tmp_path}", "--seed=3"])
    text = to_yaml(config).replace("efficiency:\n", f"efficiency:\n{line}\n")
    text = text.replace("  precision: auto\n", "") if "precision" in line else text
    check_same_run(config, {"config": text}, finished=False)
    key = line.split(":")[0].strip()
    sentence = rf"{tmp_path}: sections efficiency, .* are not read, as .*efficiency\.{key}"
    assert re.search(sentence, capsys.readouterr().err)
    with pytest.raises(UserError, match="seed was 3 and is now 4"):
        check_same_run(replace(config, seed=4), {"config": text}, finished=False)
    (tmp_path / "config.yaml").write_text(text)
    check_same_run(replace(config, seed=4), None, finished=False)  # nothing was saved
    found = config_of_run(tmp_path)
    assert found is not None
    assert (found.seed, found.efficiency) == (3, EfficiencyConfig())


def test_changed_probe_is_announced(tmp_path: Path, capsys) -> None:
    """Another interval too: fewer probes may each take more images."""

    def resume(*flags: str) -> str:
        notify.cache_clear()
        config = load_config(PretrainConfig, [], [f"--output.dir={tmp_path}", *flags])
        check_same_run(config, saved, finished=False)
        return capsys.readouterr().err

    before = load_config(PretrainConfig, [], [f"--output.dir={tmp_path}", "--probe.every=5%"])
    saved = {"config": to_yaml(before)}
    assert not resume("--probe.every=5%")
    assert not resume("--probe.val_images=7")  # without probe.every
    for changed in (["--probe.every=10%"], ["--probe.every=5%", "--probe.val_images=7"]):
        assert "later scores may be of other images" in resume(*changed)
