"""Structure of configs and flags, checked before the parser sees them."""

import pytest

from mae_et import PretrainConfig, UserError, load_config
from mae_et.config.key_checks import check_flags, check_text


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("optim: {batch_size: 8}\nseed: 1\noptim: {base_lr: 1}", "optim is given twice.* 1 and 3"),
        ("optim:\n  base_lr: 1\n  base_lr: 2", "base_lr is given twice, in lines 2 and 3"),
        ("curriculum:\n  epochs: 0100", "line 2: 0100 is an octal number"),
        ("optim: {batch_size: 12:00}", "line 1: 12:00 is a base-60 number"),
        ("[1]", "a config is a mapping of keys, not \\[1\\]"),
        ("# none", "the config has no keys"),
    ],
)
def test_what_yaml_reads_otherwise_than_written_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check_text(text, PretrainConfig)


def test_nested_flags_are_read_as_strictly_as_files() -> None:
    for flag in ("--data.replay={96: 010}", "--efficiency.micro_batch={96: 4, 96: 8}"):
        with pytest.raises(UserError, match=r"replay: .*octal number|micro_batch: 96 is given twi"):
            check_flags([flag], PretrainConfig)
    for flag in ("--seed=1:30", "--output.log_every=1:00", "--curriculum.epochs=1:30.5"):
        with pytest.raises(UserError, match="is a base-60 number"):
            check_flags([flag], PretrainConfig)
    # No YAML: a decimal number, and names.
    flags = ["--seed=010", "--output.dir=0100", "--data.train_split=12:30"]
    config = load_config(PretrainConfig, [], flags)
    assert (config.seed, str(config.output.dir), config.data.train_split) == (10, "0100", "12:30")


@pytest.mark.parametrize("key", ["optim", "optim.batch_size", "curriculum.cost", "output.dir"])
def test_null_is_refused_where_a_key_has_no_such_value(key: str) -> None:
    """An empty value in YAML is null, and the parser took it for any type."""
    section, _, name = key.partition(".")
    with pytest.raises(UserError, match=rf"{key} is null or empty"):
        check_text(f"{section}: {{{name}: }}" if name else f"{section}:", PretrainConfig)
    check_text("data: {root: }\nefficiency: {step_timeout: null}", PretrainConfig)


@pytest.mark.parametrize("word", ["--seed.x", "--data.root.dir=a", "--output.dir.name"])
def test_a_flag_below_a_value_suggests_the_value(word: str) -> None:
    parent = word.partition("=")[0].rpartition(".")[0]
    with pytest.raises(UserError, match=f"there is no flag .*; did you mean {parent}\\?"):
        check_flags([word, "1"], PretrainConfig)
    check_flags(["--data.replay.96", "4", "--efficiency.micro_batch.96=8"], PretrainConfig)
