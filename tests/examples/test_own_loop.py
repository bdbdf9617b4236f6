import runpy
from pathlib import Path

from mae_et import load_config, pretrain
from mae_et.config.schema import PretrainConfig
from mae_et.io.metrics_file import read_metrics

SCRIPT = Path(__file__).parents[2] / "examples" / "own_loop.py"
SAME_RUN = """
model: {encoder: vit_tiny_patch16_224, image_size: 64, patch_size: 8, encoder_embed_dim: 64,
        encoder_depth: 2, encoder_num_heads: 2, decoder_embed_dim: 32, decoder_depth: 1,
        decoder_num_heads: 2}
data: {synthetic_size: 64, synthetic_train: 512}
curriculum: {preset: etpp, epochs: 1.25, cost: area}
optim: {batch_size: 64, base_lr: 4.0e-3}
efficiency: {device: cpu, num_workers: 0}
output: {log_every: 1, reconstruct_images: 0, tensorboard: false}
"""


def test_a_loop_of_one_s_own_has_the_losses_of_mae_et_pretrain(tmp_path: Path) -> None:
    (tmp_path / "same.yaml").write_text(SAME_RUN)
    config = load_config(
        PretrainConfig, [tmp_path / "same.yaml"], [f"--output.dir={tmp_path / 'run'}"]
    )
    rows = read_metrics(pretrain(config))
    steps = list(runpy.run_path(str(SCRIPT))["train"](epochs=1.25))
    assert [bandwidth for bandwidth, _ in steps] == [row["bandwidth"] for row in rows]
    assert [loss for _, loss in steps] == [row["loss"] for row in rows]
    assert steps[-1][1] < steps[0][1]


def test_the_loop_is_short() -> None:
    assert len(SCRIPT.read_text().splitlines()) <= 70
