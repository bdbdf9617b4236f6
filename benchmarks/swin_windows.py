"""Train a Swin at 64, 96 and 128 pixels, with windows that follow the image or fixed ones.

    python -m benchmarks.swin_windows follow|fixed micro|tiny IMAGES OUTPUT [--key value ...]

Fixed is timm's behaviour on smaller images: windows of 7 tokens on grids of 16, 24 and 32, which
pad the last row and column. RESULTS.md has the figures.
"""

import sys
from typing import Any

from timm.models import register_model
from timm.models.swin_transformer import SwinTransformer

from finetune.training import backbone
from mae_et.cli.main import main

SHARES = {64: 0.34, 96: 0.33, 128: 0.33}
STAGES = ", ".join(f"{{bandwidth: {size}, share: {share}}}" for size, share in SHARES.items())
SETTINGS = [
    "--model.image_size=128", "--curriculum.preset=custom", f"--curriculum.stages=[{STAGES}]",
    "--curriculum.epochs=2", "--curriculum.cost=area", "--optim.batch_size=64",
    "--optim.base_lr=2e-3", "--crop.method=resize", "--data.augment=null",
    "--output.evaluate_every=50%", "--output.tensorboard=false", "--efficiency.num_workers=0",
]  # fmt: skip
NETWORKS: dict[str, dict[str, Any]] = {
    "micro": {"embed_dim": 32, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)},
    "tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},  # Swin-T
}


def define_network(name: str, window: int, fixed: bool) -> None:
    """Register the network of `NETWORKS` as `swin_compared`."""

    @register_model
    def swin_compared(
        pretrained: bool = False, img_size: int = 128, num_classes: int = 10, in_chans: int = 3,
        drop_path_rate: float = 0.0, drop_rate: float = 0.0, **_: Any,
    ) -> SwinTransformer:  # fmt: skip
        network: Any = SwinTransformer(
            img_size=img_size, window_size=window, num_classes=num_classes, in_chans=in_chans,
            drop_path_rate=drop_path_rate, drop_rate=drop_rate, always_partition=fixed,
            strict_img_size=False, **NETWORKS[name],
        )  # fmt: skip
        about = {
            "architecture": "swin_compared",
            "input_size": (3, 128, 128),
            "classifier": "head.fc",
        }
        network.pretrained_cfg = network.default_cfg = about
        return network


if __name__ == "__main__":
    arm, network, images, output, *flags = sys.argv[1:]
    define_network(network, window=7 if arm == "fixed" else 4, fixed=arm == "fixed")
    if arm == "fixed":
        backbone.follow_image_size = lambda network, image_size: None
    place = ["--model.backbone=swin_compared", f"--data.root={images}", f"--output.dir={output}"]
    sys.exit(main(["supervised", *place, *SETTINGS, *flags]))
