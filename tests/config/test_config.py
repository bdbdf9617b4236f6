import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune import EmbedConfig, ProbeConfig
from finetune.feature_config import FeatureMapConfig
from mae_et import PretrainConfig, UserError, load_config
from mae_et.config.commands import ExportConfig, PlanConfig, ReconstructConfig
from mae_et.config.duration import duration_in_steps, is_due
from mae_et.config.efficiency import EfficiencyConfig
from mae_et.config.files import config_from_text, to_yaml
from mae_et.config.model import ModelConfig
from mae_et.config.schema import CurriculumConfig, OptimConfig, OutputConfig, Stage
from mae_et.config.shipped import find_config
from slurm import ClusterConfig

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = sorted(p.relative_to(CONFIGS).with_suffix("").as_posix() for p in CONFIGS.rglob("*.yaml"))

stages = st.builds(
    Stage, st.integers(1, 20).map(lambda n: 16 * n), st.floats(0.01, 1), st.integers(0, 10)
)
configs = st.builds(
    PretrainConfig,
    model=st.builds(
        ModelConfig,
        encoder_depth=st.none() | st.integers(1, 48),
        mask_ratio=st.floats(0.05, 0.95),
        target=st.sampled_from(["pixel", "norm_pix", "hog"]),
    ),
    curriculum=st.builds(
        CurriculumConfig,
        preset=st.just("custom"),
        stages=st.lists(stages, min_size=1, max_size=4).map(tuple),
        epochs=st.floats(0.5, 2000),
    ),
    optim=st.builds(
        OptimConfig,
        batch_size=st.integers(1, 8192),
        base_lr=st.floats(1e-6, 1),
        clip_grad=st.none() | st.floats(0.01, 10),
    ),
    efficiency=st.builds(
        EfficiencyConfig,
        micro_batch=st.none() | st.integers(1, 64) | st.just({96: 64, 224: 16}),
    ),
    output=st.builds(OutputConfig, dir=st.sampled_from([Path("runs/a b"), Path("/x/y")])),
    seed=st.integers(0, 2**31),
)


@given(config=configs)
@settings(max_examples=25)
def test_a_config_written_as_yaml_reads_back_equal(config: PretrainConfig) -> None:
    assert config_from_text(to_yaml(config), PretrainConfig) == config


def test_anchors_and_merged_keys_are_followed_unless_they_contain_themselves(place: Path) -> None:
    text = "data: &own {name: cifar10, root: a}\nprobe: {data: {<<: *own, root: b}}\n"
    (place / "a.yaml").write_text(text)
    config = load_config(PretrainConfig, "a.yaml")
    assert config.probe.data is not None
    assert (config.probe.data.name, config.probe.data.root) == ("cifar10", Path("b"))
    for text in ("data: &own {root: *own}", "data: " + "[" * 5000):
        (place / "a.yaml").write_text(text)
        with pytest.raises(UserError, match=r"a.yaml: Problems parsing config"):
            load_config(PretrainConfig, "a.yaml")


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_config_is_found_by_name_and_parses(name: str) -> None:
    """Those of classifiers are parsed in tests/finetune/test_recipes.py."""
    assert find_config(name) == CONFIGS / f"{name}.yaml"
    if not name.startswith(("finetune/", "supervised/")):
        kind = ClusterConfig if name.startswith("cluster/") else PretrainConfig
        assert isinstance(load_config(kind, [name]), kind)


@pytest.mark.parametrize(
    ("yaml", "flags", "sentence"),
    [
        ("model: {mask_ratio: 1.0}", [], "model.mask_ratio must lie in (0, 1)"),
        ("model: {image_size: 225}", [], "image_size 225 is not a multiple of the patch size 16"),
        ("model: {encoder: vit_base}", [], "model.patch_size is needed"),
        ("model: {decoder_num_heads: 7}", [], "decoder_embed_dim 512 must be a multiple"),
        ("model: {target: hog, hog_cell: 7}", [], "hog_cell 7 does not divide the patch size 16"),
        ("model: {channels: 0}", [], "model.channels must be positive"),
        ("data: {mean: [0.5, 0.5], std: [1, 1]}", [], "data.mean has 2 numbers for 3 channels"),
        ("data: {std: [1, 0, 1]}", [], "data.std must be positive"),
        ("data: {scale: [0.9, 0.1]}", [], "data.scale must be two rising positive numbers"),
        ("data: {train_split: ''}", [], "data.train_split is empty"),
        ("data: {max_bad_fraction: 1.5}", [], "data.max_bad_fraction must lie in"),
        ("data: {max_value: 0}", [], "data.max_value must be positive"),
        ("", ["--curriculum.cost="], "curriculum.cost is empty: give it a value"),
        ("data: {augment: rand-m9-mstd0.5}", [], "data.augment must read like"),
        ("curriculum: {preset: custom}", [], "curriculum.stages needs"),
        ("", ["--curriculum.stages=[{bandwidth:32}]"], "stages: write `bandwidth: 32`, with a spa"),
        ("", ["--curriculum.stages=[{bandwidths: 3}]"], "did you mean curriculum.stages.bandwidth"),
        ("", ["--curriculum.stages=[{share: x}]"], "curriculum.stages.share must be a number, g"),
        ("", ["--curriculum.stages={share: 1}"], "must be a list such as [{bandwidth: 1}], got"),
        ("curriculum: {epochs: 0}", [], "curriculum.epochs must be positive"),
        ("optim: {batch_size: 0}", [], "optim.batch_size must be positive"),
        ("optim: {warmup_fraction: 1}", [], "optim.warmup_fraction must lie"),
        ("optim: {min_lr: 1}", [], "optim.min_lr must lie between"),
        ("model: {decoder_share: 1.5}", [], "model.decoder_share must lie in (0, 1]"),
        ("efficiency: {num_workers: -1}", [], "efficiency.num_workers must lie in"),
        ("efficiency: {num_workers: 1025}", [], "efficiency.num_workers must lie in"),
        ("efficiency: {micro_batch: 0}", [], "efficiency.micro_batch must be positive"),
        ("output: {keep_last: 0}", [], "output.keep_last"),
        ("", ["--output.reconstruct_images=-1"], "output.reconstruct_images must not be negative"),
        ("data: {mean: [0, .nan, 0]}", [], "data.mean must be finite"),
        ("data: {std: [1, .inf, 1]}", [], "data.std must be positive"),
        ("data: {ratio: [1, .inf]}", [], "data.ratio must be two rising positive numbers"),
        ("optim: {base_lr: .inf}", [], "optim.base_lr must be positive"),
        ("optim: {weight_decay: .inf}", [], "optim.weight_decay must not be negative"),
        ("efficiency: {step_timeout: .inf}", [], "efficiency.step_timeout must lie in (0, 1e8]"),
        ("output: {log_every: 5 epochs}", [], "output.log_every must be a number of steps or"),
        ("optim: [1, 2", [], "Problems parsing"),
        ("optim: {betas: [2, 3]}", [], "optim.betas must lie in [0, 1)"),
        ("optim: {weight_decay_end: -1}", [], "optim.weight_decay_end must not be negative"),
        ("model: {encoder_num_heads: 0}", [], "model.encoder_num_heads must be positive"),
        ("curriculum: {epochs: .inf}", [], "curriculum.epochs must be positive"),
        ("curriculum: {shares_of: images}", [], "curriculum.shares_of needs"),
        ("seed: -1", [], "seed must lie in"),
        ("", ["--seed", str(2**64)], "seed must lie in"),
        ("data: {name: synthetic, root: x}", [], "data.name synthetic needs none"),
        (
            "{data: {augment: rand, mean: [1.0], std: [1.0]}, model: {channels: 1}}",
            [],
            "data.augment needs images of 3 channels",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_sentence_that_names_the_key(
    tmp_path: Path, yaml: str, flags: list[str], sentence: str
) -> None:
    (tmp_path / "c.yaml").write_text(yaml)
    with pytest.raises(UserError) as caught:
        load_config(PretrainConfig, [tmp_path / "c.yaml"] if yaml else [], flags)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (ExportConfig, {"format": "timm", "output": Path("a"), "encoder_num_heads": -3}),
        (ReconstructConfig, {"decoder_num_heads": 0}),
        (EmbedConfig, {"encoder_num_heads": 0}),
        (ProbeConfig, {"seed": 2**63}),
        (FeatureMapConfig, {"count": 0}),
        (PlanConfig, {"against_epochs": 0.0}),
    ],
)
def test_impossible_numbers_are_refused_by_each_command(kind, settings: dict) -> None:
    start = {} if kind is PlanConfig else {"checkpoint": Path("c")}
    with pytest.raises(UserError, match=f"^{list(settings)[-1]} must"):
        kind(**start, **settings)


def test_a_config_that_is_not_there_is_refused_with_those_that_are() -> None:
    for name in ("pretrain/nope", "/nowhere/nope.yaml", "/tmp", "[", ""):
        with pytest.raises(UserError, match=r"there is no config .*; shipped .*demo"):
            find_config(name)


def test_a_recipe_may_be_named_without_its_budget_if_there_is_one() -> None:
    assert find_config("pretrain/vit_b16_etpp").name == "vit_b16_etpp_400ep.yaml"
    assert find_config("pretrain/vit_b16_etpp_hog").name == "vit_b16_etpp_hog_400ep.yaml"


def test_durations_are_steps_or_a_share_of_the_run() -> None:
    assert [duration_in_steps(d, 210) for d in (7, "7", "5%", "0.1%", "100%")] == [7, 7, 10, 1, 210]
    for wrong in (0, "-3", "0%", "101%", "ten", "5 %%"):
        with pytest.raises(UserError):
            duration_in_steps(wrong, 200)


@pytest.mark.parametrize(
    ("every", "total", "expected"),
    [(24, 25, [0, 25]), (10, 25, [0, 10, 20, 25]), (10, 24, [0, 10, 24]), (5, 10, [0, 5, 10])],
)
def test_periodic_work_is_due_at_multiples_and_once_at_the_end(every, total, expected) -> None:
    assert [step for step in range(total + 1) if is_due(step, every, total)] == expected


def test_every_field_is_documented_for_help() -> None:
    import inspect

    for section in vars(PretrainConfig()).values():
        if not dataclasses.is_dataclass(section):
            continue
        kind = type(section)
        source = "".join(map(inspect.getsource, kind.__mro__[:-1]))
        for field in dataclasses.fields(kind):
            after = source.split(f"\n    {field.name}: ")[1].split("\n", 1)[1].lstrip()
            assert after.startswith('"""'), f"{kind.__name__}.{field.name} has no description"
