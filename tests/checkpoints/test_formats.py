"""A checkpoint is read once, whatever a command needs of it."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny_run import GOLDEN

from finetune import HeldOutAccuracy
from mae_et import UserError
from mae_et.checkpoints.formats import load_weights, peek_weights, weights_of_payload
from mae_et.checkpoints.store import list_checkpoints
from mae_et.cli.main import main
from mae_et.config.files import to_yaml
from mae_et.models.mae import MaskedAutoencoder

TINY = GOLDEN / "mae_tiny_released_format.pth"


@pytest.fixture
def reads(monkeypatch) -> Counter[str]:
    """Count how often torch reads each file."""
    counts: Counter[str] = Counter()
    load = torch.load

    def counting(file, *args, **kwargs):
        counts[Path(file).name] += 1
        return load(file, *args, **kwargs)

    monkeypatch.setattr(torch, "load", counting)
    return counts


def test_every_command_reads_a_checkpoint_once(
    finished: Path, tmp_path: Path, reads: Counter[str], monkeypatch
) -> None:
    """A file, and the last or all of a run."""
    file = list_checkpoints(finished / "checkpoints")[-1]
    monkeypatch.chdir(tmp_path)
    quick = ["--num_workers=0", "--device=cpu"]
    fine_tuning = ["--model.image_size=32", "--curriculum.epochs=1", "--optim.batch_size=16",
                   "--efficiency.num_workers=0", "--efficiency.device=cpu"]  # fmt: skip
    for number, words in enumerate((
        ["knn", *quick],
        ["knn", "--data.val_split=val", *quick],  # on top of the checkpoint's data
        ["linear-probe", "--epochs=1", *quick],
        ["export", "--format=timm", f"--output={tmp_path / 'encoder.safetensors'}"],
        ["reconstruct", f"--output={tmp_path / 'images.png'}", "--device=cpu"],
        ["finetune", f"--output.dir={tmp_path / 'tuned'}", *fine_tuning],
    ), start=1):  # fmt: skip
        assert main([words[0], f"--checkpoint={file}", *words[1:]]) == 0
        assert reads == {file.name: number}, words
    reads.clear()
    for number, words in enumerate((["knn", *quick], ["reconstruct", "--device=cpu"]), start=1):
        assert main([words[0], f"--checkpoint={finished}", *words[1:]]) == 0
        assert reads == {file.name: number}, words
    HeldOutAccuracy(num_workers=0, device="cpu")(finished)
    assert reads == {file.name: 3}
    reads.clear()
    assert main(["dynamics", f"--checkpoint={finished}", "--bandwidths=[8]", *quick]) == 0
    assert reads == {path.name: 1 for path in list_checkpoints(finished / "checkpoints")}


def test_our_checkpoint_without_the_tensors_of_an_encoder_is_refused(tiny, tmp_path: Path) -> None:
    model = MaskedAutoencoder.from_config(tiny().model)
    tensors = model.state_dict()
    payload = {"config": to_yaml(tiny()), "plan": {}, "model": tensors}
    assert weights_of_payload(tmp_path, payload).encoder
    for name in ("encoder.patch_embed.proj.weight", "encoder.pos_embed"):
        for change in ({name: tensors[name].flatten()}, {f"x.{name}": tensors[name]}):
            lacking = {key: value for key, value in tensors.items() if key != name} | change
            with pytest.raises(UserError, match=r"holds no (plain )?vision transformer"):
                weights_of_payload(tmp_path, payload | {"model": lacking})


def test_unknown_key_of_another_version_is_named_with_the_file(tiny, tmp_path: Path) -> None:
    path, model = tmp_path / "a.pth", MaskedAutoencoder.from_config(tiny().model)
    later = to_yaml(tiny()).replace("model:\n", "model:\n  later: 1\n", 1)
    run = {"config": later, "plan": {}, "model": model.state_dict()}
    export = {"model": model.encoder.state_dict(), "mae_et.model": '{"later": 1}'}
    for payload in (run, export):
        with pytest.raises(UserError, match=r"a\.pth .*another version of .* no key model\.later"):
            weights_of_payload(path, payload)


def test_weights_read_ahead_are_handed_over_once_and_never_stale(tmp_path: Path, reads) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(TINY.read_bytes())
    ahead = peek_weights(path)
    assert load_weights(path) is ahead
    assert load_weights(path) is not ahead
    assert reads["a.pth"] == 2
    peek_weights(path)
    torch.save({"model": ahead.encoder | {"cls_token": torch.ones(1, 1, 48)}}, path)
    assert load_weights(path).encoder["cls_token"].eq(1).all()
