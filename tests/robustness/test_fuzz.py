"""Readers refuse invalid files with their documented error, and run no code from them.

They are given changed copies of valid files, the same in every run.
"""

import random
from pathlib import Path

import pytest
from fuzz.targets import TARGETS
from fuzz.valid_files import (
    encoder,
    header_of,
    mae_file,
    pickle_of,
    run_checkpoint,
    with_header,
    with_pickle,
)  # fmt: skip
from fuzz.watch import nothing_runs, within
from hostile import changed
from sealing import seal_archive

from mae_et.checkpoints.formats import load_weights
from mae_et.checkpoints.store import load_checkpoint

CHANGED = 12


@pytest.mark.parametrize("name", TARGETS)
def test_valid_and_modified_files_load_or_raise_the_documented_error(
    name: str, tmp_path: Path
) -> None:
    target = TARGETS[name]
    chance = random.Random(name)
    inputs = [b"", b"\0", *target.seeds()]
    # The first byte chooses a part of what is read.
    inputs += [changed(chance.choice(inputs[2:]), chance, first=1) for _ in range(CHANGED)]
    for number, data in enumerate(inputs):
        folder = tmp_path / str(number)
        folder.mkdir()
        with nothing_runs(tmp_path), within():
            target.read(data, folder)


def test_reassembled_files_still_load(tmp_path: Path) -> None:
    """Otherwise readers would refuse them before reaching the modified part."""
    path = tmp_path / "step-00000001.pt"
    path.write_bytes(with_pickle(run_checkpoint(), pickle_of(run_checkpoint())))
    seal_archive(path)
    assert load_checkpoint(path)["step"] == 1
    path.write_bytes(with_pickle(mae_file(), pickle_of(mae_file())))
    assert "pos_embed" in load_weights(path).encoder
    assert with_header(encoder(), header_of(encoder())) == encoder()
