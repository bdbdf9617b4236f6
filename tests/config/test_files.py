"""Config files: errors in one sentence, and the keys that change numbers."""

from mae_et import PretrainConfig
from mae_et.config.files import numeric_keys
from mae_et.config.refusals import one_sentence


def test_numeric_keys_exclude_output_and_efficiency() -> None:
    keys = numeric_keys(PretrainConfig())
    assert "optim.base_lr" in keys
    assert "seed" in keys
    assert not [key for key in keys if key.startswith(("output", "efficiency"))]


def test_error_of_the_parser_becomes_one_sentence() -> None:
    assert one_sentence(ValueError("a\n  <class 'int'>")) == "a int"
    assert one_sentence(MemoryError()) == "MemoryError"
