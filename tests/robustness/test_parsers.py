"""Curricula of any stages, shares and budgets are planned as asked, or refused."""

import re

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_et import Curriculum, Plan, Stage, UserError

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


@given(
    stages=stages, shares_of=st.sampled_from(["compute", "images"]),
    epochs=st.floats(0.1, 1000), size=st.integers(1, 10_000), batch=st.integers(1, 512),
)  # fmt: skip
@settings(max_examples=80, derandomize=True)
def test_plan_is_refused_or_splits_its_budget_by_shares(
    stages, shares_of, epochs, size, batch
) -> None:
    curriculum = Curriculum(tuple(stages), 64, PATCH, shares_of)
    try:
        plan = curriculum.plan(epochs, size, batch)
    except UserError as error:
        assert re.search("larger than the dataset|less than one step", str(error))  # noqa: PT017
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
