import hashlib
import pickle
from pathlib import Path

import pytest
import torch
from sealing import seal_archive
from train_state import state

from mae_et import Curriculum, UserError
from mae_et.checkpoints import checksums
from mae_et.checkpoints.checksums import check_archive
from mae_et.checkpoints.store import (
    checkpoint_step,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    newest_of_run,
    prune_checkpoints,
    rename_damaged_after,
    save_checkpoint,
)
from mae_et.checkpoints.weight_files import describe_refusal, summarise_error


def save(folder: Path, *steps: int) -> None:
    for step in steps:
        save_checkpoint(folder, state(step).to_dict(), "seed: 0", {"plan": 1})


def test_a_state_comes_back_whole(tmp_path: Path) -> None:
    saved = state(3)
    save_checkpoint(tmp_path, saved.to_dict(), "seed: 0", {"steps": 9})
    payload = newest_checkpoint(tmp_path)
    assert payload is not None
    assert (payload["config"], payload["plan"]) == ("seed: 0", {"steps": 9})
    restored = state(99)
    restored.restore(payload)
    assert (restored.step, restored.seconds) == (3, 1.5)
    for ours, theirs in zip(
        restored.model.state_dict().values(), saved.model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)
    moments = [s.optimizer.state_dict()["state"] for s in (restored, saved)]
    for index, expected in moments[1].items():
        assert expected.keys() == {"step", "exp_avg", "exp_avg_sq"}
        for name, moment in expected.items():
            assert torch.equal(moments[0][index][name], moment), name


def test_a_checkpoint_is_the_archive_of_torch_followed_by_its_checksum(tmp_path: Path) -> None:
    """Or with it as the archive's comment, as earlier versions wrote."""
    saved = state(3).to_dict()
    path = save_checkpoint(tmp_path, saved, "seed: 0", {"steps": 9}, {"images": 4})
    content = path.read_bytes()
    about = {"format": "mae-et/1", "config": "seed: 0", "plan": {"steps": 9}}
    with (tmp_path / "archive").open("wb") as plain:  # torch stores a path's name in the archive
        torch.save(about | {"origin": {"images": 4}} | saved, plain)
    archive = (tmp_path / "archive").read_bytes()
    assert content[:-71] == archive
    assert content[-71:].decode() == "sha256:" + hashlib.sha256(archive).hexdigest()
    assert check_archive(path)
    before = archive[:-2] + (71).to_bytes(2, "little")
    path.write_bytes(before + b"sha256:" + hashlib.sha256(before).hexdigest().encode())
    assert load_checkpoint(path)["config"] == "seed: 0"


def test_the_newest_is_found_by_number_and_other_files_are_ignored(tmp_path: Path) -> None:
    save(tmp_path, 9, 10, 100)
    (tmp_path / "step-0000010.pt").write_text("seven digits")
    (tmp_path / "notes.txt").write_text("")
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step-00000009.pt", "step-00000010.pt", "step-00000100.pt",
    ]  # fmt: skip
    assert newest_checkpoint(tmp_path)["step"] == 100  # type: ignore[index]
    assert newest_checkpoint(tmp_path / "missing") is None


def test_weights_of_a_run_that_is_not_finished_are_reported(tmp_path: Path, capsys) -> None:
    plan = Curriculum.preset("constant", 32, 8).plan(1, 10, 2).to_dict()
    said = []
    for step in (3, 5):
        save_checkpoint(tmp_path / "checkpoints", state(step).to_dict(), "seed: 0", plan)
        assert newest_of_run(tmp_path)["step"] == step  # type: ignore[index]
        said.append(capsys.readouterr().err)
    assert "is not finished: its weights after step 3 of 5" in said[0]
    assert said[1] == ""
    assert newest_of_run(tmp_path / "missing") is None


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_checkpoint_is_passed_over_with_a_warning(tmp_path: Path, share: float) -> None:
    save(tmp_path, 1, 2)
    newest = list_checkpoints(tmp_path)[-1]
    content = newest.read_bytes()
    newest.write_bytes(content[: int(len(content) * share)])
    with pytest.warns(UserWarning, match=r"00002\.pt is damaged: it is cut short; falling"):
        assert newest_checkpoint(tmp_path)["step"] == 1  # type: ignore[index]


@pytest.mark.parametrize("share", [0.1, 0.4, 0.6, 0.9])
def test_a_flipped_bit_is_noticed(tmp_path: Path, share: float) -> None:
    save(tmp_path, 1)
    path = list_checkpoints(tmp_path)[0]
    content = bytearray(path.read_bytes())
    content[int(len(content) * share)] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: it does not match its checksum"):
        load_checkpoint(path)


def test_files_of_other_programs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "step-00000001.pt"
    torch.save({"model": {}}, path)
    with pytest.raises(ValueError, match="damaged, or not a checkpoint of a run: it has no checks"):
        load_checkpoint(path)
    seal_archive(path)
    with pytest.raises(ValueError, match="not a checkpoint of a mae-et run"):
        load_checkpoint(path)


def test_checkpoint_in_another_format_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 1)
    later = tmp_path / "step-00000002.pt"
    torch.save({"format": "mae-et/2"}, later)
    seal_archive(later)
    sentence = r"00002\.pt was saved by another version of mae-et: its format is mae-et/2"
    with pytest.raises(UserError, match=sentence):
        newest_checkpoint(tmp_path)


def test_the_last_k_and_every_nth_are_kept(tmp_path: Path) -> None:
    (tmp_path / "step-00000001.pt").mkdir()  # no checkpoint
    save(tmp_path, 5, 10, 15, 20, 25)
    prune_checkpoints(tmp_path, 2, lambda step: step % 10 == 0)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        f"step-{step:08d}.pt" for step in (1, 10, 20, 25)
    ]
    prune_checkpoints(tmp_path, 1, lambda step: False)
    assert len(list_checkpoints(tmp_path)) == 1


def test_checkpoints_newer_than_a_step_are_renamed_damaged(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        (tmp_path / f"step-{step:08d}.pt").touch()
    assert checkpoint_step(tmp_path / "step-00000003.pt") == 3
    rename_damaged_after(tmp_path, 1)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-00000001.pt", "step-00000002.pt.damaged", "step-00000003.pt.damaged"]
    save(tmp_path, 4)
    with pytest.raises(UserError, match=r"has continued the run .* step-00000004\.pt exists"):
        rename_damaged_after(tmp_path, 1)
    assert newest_checkpoint(tmp_path)["step"] == 4  # type: ignore[index]


def test_errors_of_libraries_become_one_sentence() -> None:
    assert summarise_error(KeyError("a\n b. And more.")) == "KeyError: 'a\\n b"
    refusal = pickle.UnpicklingError("Unsupported global: GLOBAL os.system was not an allowed")
    assert describe_refusal(refusal) == "it holds os.system"
    assert describe_refusal(pickle.UnpicklingError("?")) == "it is not a plain file of tensors"


def test_checkpoints_sort_by_step_beyond_eight_digits(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 2):
        (tmp_path / f"step-{step:08d}.pt").touch()
    assert [checkpoint_step(path) for path in list_checkpoints(tmp_path)] == [2, 10**8 - 1, 10**8]


def test_each_tensor_that_is_written_counts_as_progress(tmp_path: Path, monkeypatch) -> None:
    beats: list[int] = []
    monkeypatch.setattr(checksums, "heartbeat", lambda: beats.append(1))
    saved = state()
    save_checkpoint(tmp_path, saved.to_dict(), "seed: 0", {})
    assert len(beats) >= 3 * len(list(saved.model.parameters()))  # weights and two moments
