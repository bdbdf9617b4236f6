"""Wrapped state dicts, and how they differ from a model's."""

import torch

from mae_et.checkpoints.formats import differences, unwrap


def test_weights_are_unwrapped_and_differences_are_listed() -> None:
    inner = {"module.a": torch.zeros(1), "b": "text"}
    assert list(unwrap({"state_dict": inner, "epoch": 1})) == ["a"]
    ours = {"a": torch.zeros(2), "c": torch.zeros(1)}
    said = differences({"a": torch.zeros(1), "d": torch.zeros(1)}, ours)
    assert said == "1 missing (c); 1 unexpected (d); 1 misshapen (a is [1], not [2])"
    assert differences({}, {"head.x": torch.zeros(1)}, may_lack=("head.",)) == ""
