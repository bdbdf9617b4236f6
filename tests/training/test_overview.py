"""What a run says of itself at its start."""

from image_files import encoded, write_shard

import mae_et


def block(text: str) -> dict[str, str]:
    """Return the facts of the overview in the output."""
    return {line[:8].strip(): line[8:] for line in text.splitlines()}


def test_block_at_the_start_says_what_is_trained_on_what_where_and_for_how_long(tiny, capfd):
    config = tiny("--efficiency.micro_batch=6")
    folder = mae_et.pretrain(config, stop_after_step=1)
    facts = block(capfd.readouterr().err)
    model = mae_et.MaskedAutoencoder.from_config(config.model)
    parameters = sum(p.numel() for p in model.parameters())
    decoder = sum(p.numel() for p in model.decoder.parameters())
    assert facts["data"] == "synthetic, training split: 40 images, 10 classes"
    assert f"{(parameters - decoder) / 1e3:.4g}k parameters" in facts["model"]
    assert facts["model"].endswith("GFLOPs an image and step at 16 / 24 / 32 px")
    assert facts["device"] == (
        "CPU, 1 thread, float32, not compiled; micro-batch 12 / 6 / 6; 0 loader processes"
    )
    assert "steps of 12 images, 3 stages at 16 / 24 / 32 px" in facts["plan"]
    assert facts["curves"] == f"tensorboard --logdir {folder}"
    mae_et.pretrain(config, stop_after_step=2)
    assert block(capfd.readouterr().err)["start"] == "resumes after step 1 of 25"


def test_images_without_a_label_are_counted_in_a_cached_dataset_too(tiny, tmp_path, capfd):
    labelled = {f"{n}.{ending}": content for n in range(12)
                for ending, content in (("png", encoded(n)), ("cls", b"%d" % (n % 2)))}  # fmt: skip
    write_shard(tmp_path / "wds" / "0.tar", labelled | {"12.png": encoded(12)})
    data = ("--data.name=wds", f"--data.root={tmp_path / 'wds'}")
    for cache in ("none", "ram"):
        config = tiny(*data, f"--data.cache={cache}", f"--output.dir={tmp_path / cache}")
        mae_et.pretrain(config, stop_after_step=1)
        said = block(capfd.readouterr().err)["data"]
        assert said.endswith("training split: 13 images, 2 classes, 1 without a label")
