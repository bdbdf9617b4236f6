"""Curricula and configs: valid input round-trips, all other input is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzz.targets import flags
from fuzz.watch import nothing_runs
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.config import ClassifierConfig
from mae_et import Curriculum, Plan, Stage, UserError
from mae_et.config.files import config_from_text, parse_config, plain, to_yaml
from mae_et.config.schema import CurriculumConfig, PretrainConfig
from slurm.config import ClusterConfig

PATCH = 4
stages = st.lists(
    st.builds(
        Stage,
        bandwidth=st.integers(1, 16).map(lambda n: n * PATCH),
        share=st.floats(0.01, 100),
        magnitude=st.integers(0, 10),
    ),
    min_size=1,
    max_size=8,
)


def refused(read: Callable[[], Any]) -> tuple[Any, str]:
    """Return the result, or None and the error message; no other error is caught."""
    try:
        return read(), ""
    except UserError as error:
        return None, str(error)


# --- curricula ------------------------------------------------------------------------------------


@given(
    stages=stages, shares_of=st.sampled_from(["compute", "images"]),
    epochs=st.floats(0.1, 1000), size=st.integers(1, 10_000), batch=st.integers(1, 512),
)  # fmt: skip
@settings(max_examples=80, derandomize=True)
def test_plan_is_refused_or_splits_its_budget_by_shares(
    stages, shares_of, epochs, size, batch
) -> None:
    curriculum = Curriculum(tuple(stages), 64, PATCH, shares_of)
    plan, refusal = refused(lambda: curriculum.plan(epochs, size, batch))
    if plan is None:
        assert "larger than the dataset" in refusal or "less than one step" in refusal
        return
    start, done, due, total = 0, 0.0, 0.0, sum(stage.share for stage in stages)
    for asked, planned in zip(stages, plan.stages, strict=True):
        assert planned.start == start
        assert planned.steps >= 1
        unit = 1.0 if shares_of == "images" else (planned.bandwidth / 64) ** 2
        done += planned.steps * batch * unit
        due += epochs * size * asked.share / total
        # A running sum: never more than half a step (of this stage) from what was due.
        assert abs(done - due) <= batch * unit * 0.5 + 1e-6 * due
        start += planned.steps
    assert plan.steps == start
    for again in (plan.to_dict(), yaml.safe_load(yaml.safe_dump(plan.to_dict()))):
        again["stages"] = list(again["stages"])
        assert Plan.from_dict(again) == plan


@given(stages=stages, epochs=st.floats(0.01, 5000))
@settings(max_examples=15, derandomize=True)
def test_curriculum_survives_a_yaml_round_trip(stages, epochs) -> None:
    asked = CurriculumConfig("custom", tuple(stages), epochs=epochs)
    text = yaml.safe_dump({"curriculum": plain(asked)})
    assert config_from_text(text, PretrainConfig).curriculum == asked


# --- configs --------------------------------------------------------------------------------------

KEYS = [
    "model", "encoder", "image_size", "patch_size", "data", "root", "listing", "mean", "replay",
    "curriculum", "preset", "stages", "bandwidth", "share", "epochs", "optim", "batch_size",
    "betas", "efficiency", "micro_batch", "output", "folder", "log_every", "seed", "class_path",
    "init_args", "config", "time", "nodes", "extra", "srun", "recipe", "backbone", "",
]  # fmt: skip
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from(["vit_tiny_patch16_224", "5%", "etpp", "custom", "auto", "1e-3",
                     "evil_module.X", "/etc/hostname", "${x}", "rand-mstd0.5"]),
)  # fmt: skip
TREES = st.recursive(
    VALUES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS) | st.integers(0, 300), inner, max_size=3)
    ),
    max_leaves=8,
)
CONFIGS = st.dictionaries(st.sampled_from(KEYS), TREES, min_size=1, max_size=3)


@pytest.mark.parametrize("kind", [PretrainConfig, ClassifierConfig, ClusterConfig])
@given(tree=CONFIGS)
@settings(max_examples=15, derandomize=True)
def test_arbitrary_yaml_parses_or_raises_a_one_line_error(kind: type, tree, tmp_path: Path) -> None:
    with nothing_runs(tmp_path):
        found, refusal = refused(lambda: config_from_text(yaml.safe_dump(tree), kind))
    assert "\n" not in refusal
    if found is not None:
        again = config_from_text(to_yaml(found), kind)
        assert again == found or ".nan" in to_yaml(found)  # which differs from itself


@given(text=st.text(max_size=60))
@settings(max_examples=15, derandomize=True)
def test_arbitrary_text_parses_or_raises_a_one_line_error(text: str, tmp_path: Path) -> None:
    with nothing_runs(tmp_path):
        assert "\n" not in refused(lambda: config_from_text(text, PretrainConfig))[1]


@given(
    words=st.lists(
        st.tuples(st.lists(st.sampled_from(KEYS), min_size=1, max_size=3), VALUES).map(
            lambda pair: f"--{'.'.join(pair[0])}={pair[1]}"
        ),
        min_size=1, max_size=3,
    )
)  # fmt: skip
@settings(max_examples=20, derandomize=True)
def test_arbitrary_flags_parse_or_raise_a_one_line_error(words: list[str], tmp_path: Path) -> None:
    with nothing_runs(tmp_path):
        assert "\n" not in refused(lambda: parse_config(flags(), PretrainConfig, words))[1]
