import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_et import Curriculum, Plan, Stage, UserError
from mae_et.config.schema import Preset
from mae_et.curriculum.table import summarise

IMAGENET = 1_281_167

PATCH = 4
stages = st.lists(
    st.builds(
        Stage,
        bandwidth=st.integers(2, 16).map(lambda n: n * PATCH),
        share=st.floats(0.05, 1.0),
        magnitude=st.integers(0, 10),
    ),
    min_size=1,
    max_size=6,
)
budgets = {
    "epochs": st.floats(20, 200),
    "size": st.integers(500, 5000),
    "batch": st.integers(1, 64),
}


@given(stages=stages, shares_of=st.sampled_from(["compute", "images"]), **budgets)
@settings(max_examples=200)
def test_steps_add_up_to_the_budget_within_one_step(stages, shares_of, epochs, size, batch) -> None:
    curriculum = Curriculum(tuple(stages), base=64, patch=PATCH, shares_of=shares_of)
    plan = curriculum.plan(epochs, size, batch)
    extended = curriculum.with_budget(plan, 2 * epochs)
    assert extended.stages[:-1] == plan.stages[:-1]
    assert Plan.from_dict(extended.to_dict()) == extended
    shortened = curriculum.with_budget(extended, 1.5 * epochs)
    for planned, budget in ((plan, epochs), (extended, 2 * epochs), (shortened, 1.5 * epochs)):
        if shares_of == "images":
            assert abs(planned.images - budget * size) <= batch
        else:
            assert abs(planned.compute - budget * size * 64**2) <= batch * 64**2


@given(stages=stages, **budgets)
@settings(max_examples=100)
def test_progress_rises_linearly_within_a_stage_from_0_to_1(stages, epochs, size, batch) -> None:
    plan = Curriculum(tuple(stages), 64, PATCH).plan(epochs, size, batch)
    assert plan.progress(0) == 0
    assert plan.progress(plan.steps) == pytest.approx(1)
    for stage in plan.stages:
        edges = [plan.progress(stage.start + k) for k in (0, 1, stage.steps - 1, stage.steps)]
        assert edges[1] - edges[0] == pytest.approx(edges[3] - edges[2])
        assert edges[0] < edges[3]


@given(stages=stages, **budgets)
@settings(max_examples=50)
def test_every_step_maps_to_the_stage_that_covers_it(stages, epochs, size, batch) -> None:
    plan = Curriculum(tuple(stages), 64, PATCH).plan(epochs, size, batch)
    for stage in plan.stages:
        assert plan.at(stage.start) == stage
        assert plan.at(stage.start + stage.steps - 1) == stage
    for outside in (-1, plan.steps):
        with pytest.raises(IndexError):
            plan.at(outside)


def bandwidths(name: Preset, base: int = 224, patch: int = 1) -> list[int]:
    return [stage.bandwidth for stage in Curriculum.preset(name, base, patch).stages]


def test_presets_equal_the_published_curricula() -> None:
    assert bandwidths("constant") == [224]
    assert bandwidths("et") == [160] * 6 + [192] * 2 + [224] * 2
    assert bandwidths("etpp") == [96] * 2 + [160] * 4 + [224] * 4
    assert bandwidths("etpp_deit") == [96] * 2 + [160] * 4 + [192] * 2 + [224] * 2
    assert bandwidths("etpp_convnext") == [160] * 6 + [224] * 4
    assert [s.magnitude for s in Curriculum.preset("etpp").stages] == list(range(10))


def test_etpp_stages_have_equal_compute_and_et_stages_equal_epochs() -> None:
    plan = Curriculum.preset("etpp", 224, 16).plan(400, IMAGENET, 4096)
    shares = [s.steps * s.cost * 4096 / plan.compute for s in plan.stages]
    assert all(abs(share - 0.1) < 1e-4 for share in shares)
    plan = Curriculum.preset("et", 224, 16).plan(300, IMAGENET, 4096)
    assert all(abs(s.steps - plan.steps / 10) <= 1 for s in plan.stages)
    # 0.6 (160/224)^2 + 0.2 (192/224)^2 + 0.2 of 300 epochs
    assert plan.equivalent_epochs == pytest.approx(300 * 0.6531, rel=1e-3)
    assert plan.speedup(300) == pytest.approx(1 / 0.6531, rel=1e-3)


@pytest.mark.parametrize(("epochs", "speedup"), [(99, 1), (100, 16)])
def test_budgets_from_100_epochs_are_compared_with_1600(epochs: int, speedup: int) -> None:
    """In whole steps, 100 epochs of ImageNet are 99.998."""
    plan = Curriculum.preset("constant").plan(epochs, IMAGENET, 4096)
    assert plan.equivalent_epochs < 100
    assert summarise(plan, "area", None)["speedup"] == pytest.approx(speedup, rel=1e-4)


@pytest.mark.parametrize(
    ("base", "patch", "expected"),
    [(128, 16, [64, 96, 128]), (64, 8, [32, 48, 64]), (224, 14, [98, 168, 224]),
     (384, 16, [176, 288, 384])],
)  # fmt: skip
def test_presets_scale_to_other_sizes_without_losing_spectrum(
    base: int, patch: int, expected: list[int]
) -> None:
    found = bandwidths("etpp", base, patch)
    assert sorted(set(found)) == expected
    for paper, ours in zip((96, 160, 224), expected, strict=True):
        assert paper / 224 <= ours / base < paper / 224 + patch / base


@pytest.mark.parametrize(
    ("stage", "sentence"),
    [
        (Stage(90, 1), "bandwidth 90 is not a multiple of the patch size 16"),
        (Stage(256, 1), "bandwidth 256 exceeds the base size 224"),
        (Stage(-16, 1), "bandwidth -16 is not a multiple"),
        (Stage(96, 0), "share must be positive"),
        (Stage(96, math.nan), "share must be positive"),
        (Stage(96, 1e308), r"share must be positive, got 1e\+308"),
        (Stage(96, 1, 11), "magnitude must be in"),
    ],
)
def test_impossible_stages_raise_a_user_error(stage: Stage, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Curriculum((stage,), 224, 16)


def test_a_stage_without_a_bandwidth_is_at_the_base_size() -> None:
    assert Curriculum((Stage(96, 0.5), Stage()), 224, 16).stages[1] == Stage(224)


def test_impossible_plans_raise_a_user_error() -> None:
    curriculum = Curriculum.preset("etpp", 224, 16)
    with pytest.raises(UserError, match="larger than the dataset of 100 images"):
        curriculum.plan(10, 100, 101)
    with pytest.raises(UserError, match="less than one step") as caught:
        curriculum.plan(2, 50, 32)
    advice = r"give at least (\d+) epochs, or a batch of at most (\d+)$"
    found = re.search(advice, str(caught.value))
    assert found is not None
    least, most = map(int, found.groups())
    curriculum.plan(least, 50, 32)
    curriculum.plan(2, 50, most)
    for epochs, batch in ((least - 1, 32), (2, most + 1)):
        with pytest.raises(UserError, match="less than one step"):
            curriculum.plan(epochs, 50, batch)
    assert curriculum.plan(2, 50, 32, stretch=True) == curriculum.plan(least, 50, 32)
    with pytest.raises(UserError, match="batch_size must be positive"):
        curriculum.plan(1, 100, 0)
    for epochs in (1.01e7, 1e308, math.nan):  # a billion steps are the most
        sentence = re.escape(f"curriculum.epochs {epochs:g} is a budget of {epochs * 100:.3g} step")
        with pytest.raises(UserError, match=sentence):
            curriculum.plan(epochs, 1000, 10)
        with pytest.raises(UserError, match=sentence):
            curriculum.with_budget(curriculum.plan(10, 1000, 10), epochs)
    with pytest.raises(UserError, match="leaves the last stage less than one step"):
        curriculum.with_budget(curriculum.plan(10, 1000, 10), 9)
    plan = curriculum.plan(10, 1000, 10).to_dict()
    first, *rest = plan["stages"]
    for damage, sentence in (
        *((each, "must be positive") for each in (
            {"batch_size": 0}, {"dataset_size": 1.5}, {"base_cost": -1.0}, {"stages": []},
            *({"stages": [first | {key: 0}, *rest]} for key in ("bandwidth", "steps", "cost")),
        )),
        ({"stages": [{}]}, "entries are missing"),
        ({"stages": rest}, "do not follow"),
        ({"stages": [first, first, *rest]}, "do not follow"),
        ({"stages": [first | {"magnitude": 10.5}, *rest]}, "magnitudes must lie"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=sentence):
            Plan.from_dict(plan | damage)
    with pytest.raises(UserError, match="empty"):
        curriculum.plan(1, 0, 1)
    with pytest.raises(UserError, match="is empty"):
        Curriculum((), 224)
    with pytest.raises(UserError, match="there is no curriculum"):
        Curriculum.preset("linear")  # type: ignore[arg-type]


def test_compute_before_a_step_sums_the_cost_of_earlier_steps() -> None:
    plan = Curriculum.preset("etpp", 64, 8).plan(20, 100, 10, cost=float)
    assert [stage.cost for stage in plan.stages] == bandwidths("etpp", 64, 8)
    by_step = [plan.at(step).cost * plan.batch_size for step in range(plan.steps)]
    for step in (0, 1, plan.steps // 2, plan.steps):
        assert plan.compute_before(step) == pytest.approx(sum(by_step[:step]))
