"""What a run reports that resumes with other code or libraries."""

from pathlib import Path

import pytest
from tiny_run import config_in

from mae_et import pretrain
from mae_et.checkpoints.store import newest_checkpoint, save_checkpoint
from mae_et.runtime.agreement import code_version
from mae_et.runtime.console import notify
from mae_et.training.resume.same_data import report_other_code
from mae_et.version import __version__


def test_checkpoint_records_the_code_and_other_code_is_reported(tmp_path: Path, capsys) -> None:
    config = config_in(tmp_path)
    pretrain(config, stop_after_step=1)
    folder = config.output.dir / "checkpoints"
    saved = newest_checkpoint(folder)
    assert saved is not None
    assert saved["origin"]["code"] == code_version("mae_et")
    assert saved["origin"]["code"]["mae-et"] == __version__
    pretrain(config, stop_after_step=2)
    assert "was saved with" not in capsys.readouterr().err
    saved = newest_checkpoint(folder)
    assert saved is not None
    saved["origin"]["code"] |= {"torch": "1.9.0", "the code of mae_et": "0123456789ab"}
    state = {key: saved[key] for key in saved.keys() - {"format", "config", "plan", "origin"}}
    save_checkpoint(folder, state, saved["config"], saved["plan"], saved["origin"])
    pretrain(config, stop_after_step=3)
    now = code_version("mae_et")
    assert (
        f"mae-et: step 2 was saved with torch 1.9.0 (now {now['torch']}), the code of mae_et "
        f"0123456789ab (now {now['the code of mae_et']}): later numbers may move (CHANGELOG.md)\n"
    ) in capsys.readouterr().err
    saved = newest_checkpoint(folder)
    assert saved is not None
    assert saved["origin"]["code"] == now  # of the code that saved this step


@pytest.mark.parametrize("origin", [{}, {"code": None}, {"code": ["torch"]}])
def test_checkpoint_that_records_no_code_is_reported(origin: dict, capsys) -> None:
    notify.cache_clear()
    report_other_code({"step": 1000, "origin": origin}, {"mae-et": "0.1.0"})
    assert "1,000 was saved with an earlier version of mae-et, which it" in capsys.readouterr().err
