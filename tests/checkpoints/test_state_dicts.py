"""Wrapped state dicts, and how they differ from a model's."""

import torch

from mae_et.checkpoints.state_dicts import describe_mismatch, unwrap


def test_weights_are_unwrapped_and_differences_are_listed() -> None:
    inner = {"module.a": torch.zeros(1), "b": "text"}
    assert list(unwrap({"state_dict": inner, "epoch": 1})) == ["a"]
    ours = {"a": torch.zeros(2), "c": torch.zeros(1)}
    mismatch = describe_mismatch({"a": torch.zeros(1), "d": torch.zeros(1)}, ours)
    assert mismatch == "1 missing (c); 1 unexpected (d); 1 misshapen (a is [1], not [2])"
    assert describe_mismatch({}, {"head.x": torch.zeros(1)}, may_lack=("head.",)) == ""
