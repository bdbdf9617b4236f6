"""Every shipped recipe of classifiers, value by value against what is published."""

from pathlib import Path

import pytest
import timm

from finetune import ClassifierConfig
from mae_et import Curriculum, load_config
from mae_et.training.plan import micro_batch_size

CONFIGS = Path(__file__).parents[2] / "configs"

# EfficientTrain++: arXiv 2405.08768, and its released code (LeapLabTHU/EfficientTrain).
ETPP = {
    "curriculum.preset": "etpp", "curriculum.epochs": 200, "crop.method": "resize",
    "data.augment": "rand-mstd0.5-inc1", "data.scale": (0.08, 1.0),
    "recipe.mixup": 0.8, "recipe.cutmix": 1.0, "recipe.smoothing": 0.1, "recipe.erasing": 0.25,
    "optim.optimizer": "adamw", "optim.batch_size": 4096, "optim.lr": 4e-3, "optim.min_lr": 1e-6,
    "optim.weight_decay": 0.05, "optim.betas": (0.9, 0.999), "optim.warmup_fraction": 0.2,
    "optim.clip_grad": None, "optim.layer_decay": 1.0, "optim.ema": None,
    "model.image_size": 224, "model.drop_path": 0.0, "model.head_dropout": 0.0,
}  # fmt: skip
# DeiT: arXiv 2012.12877, table 9; clipping from EfficientTrain++ (5.0).
DEIT = ETPP | {"curriculum.preset": "etpp_deit", "optim.clip_grad": 5.0, "model.drop_path": 0.1}
# ConvNeXt: arXiv 2201.03545, table 5; EMA 0.9999.
CONVNEXT = ETPP | {"curriculum.preset": "etpp_convnext", "optim.ema": 0.9999}
# Swin: arXiv 2103.14030, appendix A2; clipping 5.0.
SWIN = ETPP | {"optim.clip_grad": 5.0}
# MetaFormer baselines: arXiv 2210.13452, appendix, and its scripts: LAMB at 8e-3.
CAFORMER = ETPP | {"optim.optimizer": "lamb", "optim.lr": 8e-3, "optim.clip_grad": 1.0}
# MAE: arXiv 2111.06377, table 9, and its FINETUNE.md (batch of one GPU: 32, 32, 16).
MAE_TUNING = {
    "model.pool": "mean", "model.image_size": 224, "data.augment": "rand-mstd0.5-inc1",
    "data.scale": (0.08, 1.0), "recipe.mixup": 0.8, "recipe.cutmix": 1.0, "recipe.smoothing": 0.1,
    "recipe.erasing": 0.25, "optim.optimizer": "adamw", "optim.batch_size": 1024,
    "optim.min_lr": 1e-6, "optim.weight_decay": 0.05, "optim.betas": (0.9, 0.999),
    "optim.clip_grad": None, "curriculum.stages[0].magnitude": 9, "optim.warmup epochs": 5,
}  # fmt: skip
MAE_B = MAE_TUNING | {
    "optim.base_lr": 5e-4, "optim.layer_decay": 0.65, "model.drop_path": 0.1,
    "curriculum.epochs": 100, "efficiency.micro_batch": 32,
}  # fmt: skip
MAE_L = MAE_B | {
    "optim.base_lr": 1e-3, "optim.layer_decay": 0.75, "model.drop_path": 0.2,
    "curriculum.epochs": 50,
}  # fmt: skip
# MAE: arXiv 2111.06377, table 10.
MAE_LINEAR = {
    "model.pool": "cls", "model.probe": "linear", "data.augment": None, "data.scale": (0.08, 1.0),
    "optim.optimizer": "lars", "optim.batch_size": 16384, "optim.base_lr": 0.1,
    "optim.min_lr": 0.0, "optim.weight_decay": 0.0, "optim.warmup epochs": 10,
    "curriculum.epochs": 90, "recipe.mixup": 0.0, "recipe.erasing": 0.0, "recipe.smoothing": 0.0,
}  # fmt: skip
# ConvNeXt: arXiv 2201.03545, table 5 (22K to 1K).
CONVNEXT_TUNING = {
    "model.backbone": "convnext_base", "model.drop_path": 0.2, "recipe.mixup": 0.0,
    "recipe.cutmix": 0.0, "recipe.smoothing": 0.1, "recipe.erasing": 0.25,
    "optim.batch_size": 512, "optim.lr": 5e-5, "optim.min_lr": 1e-6, "optim.weight_decay": 1e-8,
    "optim.layer_decay": 0.8, "optim.ema": 0.9999, "optim.warmup epochs": 0,
    "curriculum.epochs": 30,
}  # fmt: skip


# EfficientTrain++'s released code, images of a GPU and forward pass.
RELEASED_MICRO = {96: 512, 160: 512, 224: 256}
PUBLISHED = {
    "supervised/resnet50": ETPP | {"model.backbone": "resnet50", "efficiency.micro_batch": 512},
    "supervised/deit_t": DEIT | {"model.backbone": "deit_tiny_patch16_224"},
    "supervised/deit_s": DEIT
    | {
        "model.backbone": "deit_small_patch16_224",
        "efficiency.micro_batch": {**RELEASED_MICRO, 192: 256},
    },
    "supervised/convnext_t": CONVNEXT | {"model.drop_path": 0.1},
    "supervised/convnext_s": CONVNEXT
    | {"model.drop_path": 0.4, "efficiency.micro_batch": {160: 128, 224: 64}},
    "supervised/convnext_b": CONVNEXT
    | {"model.drop_path": 0.5, "efficiency.micro_batch": {160: 128, 224: 64}},
    # ConvNeXt's 22K pre-training: 90 epochs, drop path 0.1, no EMA.
    "supervised/convnext_b_22k": CONVNEXT
    | {"model.drop_path": 0.1, "curriculum.epochs": 90, "optim.ema": None},
    "supervised/swin_t": SWIN
    | {"model.drop_path": 0.2, "efficiency.micro_batch": RELEASED_MICRO},
    "supervised/swin_s": SWIN | {"model.drop_path": 0.3},
    "supervised/swin_b": SWIN | {"model.drop_path": 0.5},
    "supervised/caformer_s18": CAFORMER | {"model.drop_path": 0.15},
    "supervised/caformer_s36": CAFORMER | {"model.drop_path": 0.3, "model.head_dropout": 0.4},
    "supervised/caformer_m36": CAFORMER | {"model.drop_path": 0.4, "model.head_dropout": 0.4},
    # ViT-S is not in MAE: ViT-B's values.
    "finetune/vit_s16": MAE_B,
    "finetune/vit_b16": MAE_B,
    "finetune/vit_b16_22k_to_1k": MAE_B,
    "finetune/vit_b16_22k_to_1k_384": MAE_B | {"model.image_size": 384, "data.eval_crop": 1.0},
    "finetune/vit_l16": MAE_L,
    "finetune/vit_h14": MAE_L | {"model.drop_path": 0.3, "efficiency.micro_batch": 16},
    "finetune/vit_s16_linear": MAE_LINEAR,
    "finetune/vit_b16_linear": MAE_LINEAR,
    "finetune/vit_l16_linear": MAE_LINEAR | {"curriculum.epochs": 50},
    "finetune/vit_h14_linear": MAE_LINEAR | {"curriculum.epochs": 50},
    # Not published: MAE's linear schedule with AdamW and a trained query.
    "finetune/vit_b16_attentive": {"model.probe": "attentive", "curriculum.epochs": 90},
    "finetune/convnext_b_22k_to_1k": CONVNEXT_TUNING | {"model.image_size": 224},
    "finetune/convnext_b_22k_to_1k_384": CONVNEXT_TUNING
    | {"model.image_size": 384, "data.eval_crop": 1.0},
}  # fmt: skip


def value_of(config: ClassifierConfig, key: str) -> object:
    """Return a value of a config; warm-up is published in epochs."""
    if key == "optim.warmup epochs":
        return config.optim.warmup_fraction * config.curriculum.epochs
    if key == "curriculum.stages[0].magnitude":
        return config.curriculum.stages[0].magnitude
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def test_every_shipped_recipe_has_a_row() -> None:
    shipped = {
        f"{folder}/{path.stem}"
        for folder in ("supervised", "finetune")
        for path in (CONFIGS / folder).glob("*.yaml")
    }
    assert shipped == {*PUBLISHED, "finetune/small"}  # no published one


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_published_values_and_runs_on_eight_gpus(name: str) -> None:
    """Mixing draws once a micro-batch, so its size must divide a GPU's share of the batch."""
    start = [] if name.startswith("supervised") else ["--model.checkpoint=weights.pth"]
    config = load_config(ClassifierConfig, [name], start)
    found = {key: value_of(config, key) for key in PUBLISHED[name]}
    assert found == {
        key: pytest.approx(value, rel=1e-3) if isinstance(value, int | float) else value
        for key, value in PUBLISHED[name].items()
    }
    sizes = config.efficiency.micro_batch
    for size in sizes.values() if isinstance(sizes, dict) else [sizes]:
        assert config.optim.batch_size // 8 % size == 0
    plan = Curriculum.from_config(config.curriculum, config.model.image_size, 16).plan(
        config.curriculum.epochs, 1_281_167, config.optim.batch_size
    )
    micro_batch_size(sizes, plan, 8)  # names its bandwidths
    assert plan.equivalent_epochs == pytest.approx(config.curriculum.epochs, rel=1e-3)
    assert config.model.backbone is None or timm.is_model(config.model.backbone)
    # A recipe at another image size is trained at that size, up to its last stage; a run of the
    # recipe's own size that was started with explicit bandwidths has the same config.
    larger = load_config(ClassifierConfig, [name], [*start, "--model.image_size=[448, 512]"])
    assert Curriculum.from_config(larger.curriculum, 448, 16).stages[-1].bandwidth == 448
    if config.curriculum.stages:
        assert config.curriculum.stages[-1].bandwidth == config.model.image_size
