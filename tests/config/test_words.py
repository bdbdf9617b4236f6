"""Words of a command line: paths, spellings, and what a typo was meant to be."""

import os
from pathlib import Path

import pytest
from mae_et.benchmarks.launches import LaunchesConfig
from mae_et.benchmarks.quality import QualityConfig
from mae_et.benchmarks.step import StepConfig

from finetune import ClassifierConfig, ProbeConfig
from mae_et import PretrainConfig, UserError, load_config
from mae_et.cli.commands import config_of
from mae_et.cli.main import main
from mae_et.config.commands import ExportConfig
from mae_et.config.shipped import find_config
from mae_et.config.suggestions import _CALLED_ELSEWHERE, keys_of
from slurm import ClusterConfig


@pytest.fixture
def home(tmp_path: Path, monkeypatch) -> Path:
    """Return a home folder, which is not the current folder, and $PLACE in it."""
    (tmp_path / "home" / "pics").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PLACE", str(tmp_path / "home" / "place"))
    monkeypatch.delenv("NOT_SET", raising=False)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def test_names_of_other_trainers_stand_for_keys_and_are_none_themselves() -> None:
    keys = {*keys_of(PretrainConfig), *keys_of(ClassifierConfig)}
    assert set(_CALLED_ELSEWHERE.values()) <= keys
    assert not {key.rpartition(".")[2] for key in keys_of(PretrainConfig)} & set(_CALLED_ELSEWHERE)


@pytest.mark.parametrize("written", ["~/pics", "$HOME/pics", "${HOME}/pics"])
def test_home_and_variables_expand_in_yaml_and_in_flags(home: Path, written: str) -> None:
    Path("c.yaml").write_text(f"data: {{root: '{written}'}}\noutput: {{dir: '{written}-runs'}}")
    config = load_config(PretrainConfig, ["c.yaml"])
    assert config.data.root == home / "pics"
    assert config.output.dir == home / "pics-runs"
    config = load_config(PretrainConfig, [], [f"--data.root={written}", "--output.dir", "$PLACE/x"])
    assert (config.data.root, config.output.dir) == (home / "pics", home / "place" / "x")


def test_paths_of_every_command_expand(home: Path) -> None:
    assert config_of("knn", ["--checkpoint=~/run"]).checkpoint == home / "run"
    assert config_of("finetune", ["--checkpoint", "~/run"]).model.checkpoint == home / "run"
    assert config_of("compare", ["~/a", "$PLACE/b"]).runs == [home / "a", home / "place" / "b"]
    assert config_of("prepare", ["--output=~/shards"]).output == home / "shards"
    assert load_config(ProbeConfig, [], ["--checkpoint=x", "--output=~/x"]).output == home / "x"


def test_a_config_file_is_found_in_the_home_folder(home: Path) -> None:
    (home / "mine.yaml").write_text("seed: 7")
    assert config_of("pretrain", ["--config=~/mine.yaml"]).seed == 7
    assert config_of("pretrain", ["--config", "$HOME/mine.yaml"]).seed == 7


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        ("$NOT_SET/x", "output.dir $NOT_SET/x: the environment variable NOT_SET is not set"),
        ("${NOT_SET}/x", "the environment variable NOT_SET is not set"),
        ("~nobody-of-this-name/x", "there is no such user"),
        ("runs/x ", "output.dir 'runs/x ' begins or ends with white space"),
    ],
)
def test_a_path_that_cannot_expand_is_refused(home: Path, written: str, sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config(PretrainConfig, [], [f"--output.dir={written}"])
    assert sentence in str(refused.value)
    assert not list(home.parent.joinpath("here").iterdir())


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("x" * 256, "File name too long"),
        ("loop/x", "Too many levels of symbolic links"),
        ("mine.yaml/x", "Not a directory"),
        ("a\0b", "embedded null (byte|character in path)"),  # by version of Python
    ],
)
def test_a_path_that_no_file_can_have_is_refused(home: Path, path: str, reason: str) -> None:
    (home / "loop").symlink_to("loop")
    (home / "mine.yaml").touch()
    impossible = str(home / path)
    for command, flag in (
        ("pretrain", "output.dir"), ("plan", "data.root"), ("knn", "checkpoint"),
        ("compare", "runs"), ("pretrain", "probe.data.root"),
    ):  # fmt: skip
        words = [impossible, impossible] if flag == "runs" else [f"--{flag}={impossible}"]
        with pytest.raises(UserError, match=rf"{flag} .*{reason}$"):
            config_of(command, words)
    for words in (["pretrain", f"--config={impossible}"], ["status", impossible]):
        assert main(words) == 2


@pytest.mark.parametrize(
    "flag", ["--output.dir=", "--data.root=", "--data.name=", "--init.weights="]
)
def test_an_empty_value_is_refused(home: Path, flag: str) -> None:
    """A variable that the shell found unset: it would mean the folder here, or the default."""
    key, (section, _, name) = flag.strip("-="), flag.strip("-=").partition(".")
    with pytest.raises(UserError, match=f"{key} is empty"):
        load_config(PretrainConfig, [], [flag])
    (home / "mine.yaml").write_text(f"{section}: {{{name}: ''}}")
    with pytest.raises(UserError, match=f"{key} is empty"):
        load_config(PretrainConfig, [home / "mine.yaml"])


def test_a_folder_with_a_dollar_in_its_name_is_taken_literally(home: Path) -> None:
    Path("$cash").mkdir()
    assert load_config(PretrainConfig, [], ["--data.root=$cash"]).data.root == Path("$cash")


@pytest.mark.parametrize(
    ("words", "images"),
    [
        ([], []),
        (["--images", "a.jpg", "b.jpg", "--count=2"], ["a.jpg", "b.jpg"]),
        (["--images", "my cat, grey.jpg"], ["my cat, grey.jpg"]),
        (["--images", "a: b.jpg", "2024.jpg"], ["a: b.jpg", "2024.jpg"]),
        (["--images", "*.jpg"], ["2024.jpg", "a.jpg", "a: b.jpg", "b.jpg", "my cat, grey.jpg"]),
        (["--images=[a-j].jpg"], ["[a-j].jpg"]),
        (["--images=a.jpg"], ["a.jpg"]),
        (["--images=[a: b.jpg]"], ["a: b.jpg"]),
        (["--images", "[my cat, grey.jpg]"], ["my cat, grey.jpg"]),
        (["--images", "~/pics"], ["HOME/pics"]),
        (["--images=[a.jpg, b.jpg]"], ["a.jpg", "b.jpg"]),
        (['--images=["my cat, grey.jpg"]'], ["my cat, grey.jpg"]),
        (["--images", "missing.jpg"], ["missing.jpg"]),
    ],
)
def test_images_are_words_patterns_or_a_list(home: Path, words: list[str], images) -> None:
    for name in ("a.jpg", "b.jpg", "my cat, grey.jpg", "a: b.jpg", "2024.jpg"):
        Path(name).touch()
    if words == ["--images=[a-j].jpg"]:
        images = ["a.jpg", "b.jpg"]
    found = config_of("reconstruct", ["run", *words]).images
    assert found == tuple(Path(name.replace("HOME", str(home))) for name in images)


@pytest.mark.parametrize("command", ["knn", "linear-probe", "evaluate", "dynamics"])
def test_the_first_word_is_the_run(command: str) -> None:
    words = ["runs/a", "--batch_size=3"]
    assert config_of(command, words).checkpoint == Path("runs/a")
    assert config_of(command, ["--checkpoint", *words]).checkpoint == Path("runs/a")


@pytest.mark.parametrize("spelled", ["--num_workers=3", "--num-workers=3"])
def test_flags_take_dashes_and_underscores_alike(spelled: str) -> None:
    assert config_of("knn", ["run", spelled]).num_workers == 3
    under = spelled.replace("--", "--efficiency.")
    assert config_of("pretrain", [under]).efficiency.num_workers == 3
    assert load_config(ClusterConfig, [], ["--cpus-per-task", "4"]).cpus_per_task == 4
    assert config_of("reconstruct", ["run", "--mask-ratio", "0.5"]).mask_ratio == 0.5


@pytest.mark.parametrize(
    ("yaml", "sentence"),
    [
        ("seed: 1\noptim:\n  batch_size: 8\n  base_lrr: 3\n",
         "c.yaml, line 4: there is no key optim.base_lrr; did you mean optim.base_lr?"),
        ("modle: {patch_size: 8}", "c.yaml, line 1: there is no key modle; did you mean model?"),
        ("\n\nbatch_size: 8", "line 3: there is no key batch_size; did you mean optim.batch_size?"),
        ("data:\n  workers: 3", "line 2: there is no key data.workers; did you mean"),
        ("zzz: 1", "c.yaml, line 1: there is no key zzz"),
        ("seed: 1\noptim.base_lr: 3",
         "line 2: optim.base_lr is written as a section and a key in it, optim: {base_lr: ...}"),
    ],
)  # fmt: skip
def test_a_typo_in_yaml_is_reported_with_its_line_and_the_closest_key(
    home: Path, yaml: str, sentence: str
) -> None:
    Path("c.yaml").write_text(yaml)
    with pytest.raises(UserError) as refused:
        load_config(PretrainConfig, ["c.yaml"])
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--optim.batch_size=abc", "optim.batch_size must be a whole number, got abc"),
        ("--data.download=maybe", "data.download must be true or false, got maybe"),
        ("--optim.betas=3", "optim.betas must be a list such as [1, 2], got 3"),
        ("--model.target=edges", "model.target must be one of 'pixel', 'norm_pix', 'hog', got"),
        ("--model.patch_size=8.5", "model.patch_size must be a whole number, got 8.5"),
        ("--data.replay=2", "data.replay must be a mapping such as {96: 2}, got 2"),
        ("--data.replay={16: a}", "data.replay must be a mapping such as {96: 2}, got {16: 'a'}"),
        ("--data.replay={16:2}", "{96: 2}, with a space after each colon"),  # a null in YAML
        ("--efficiency.compile=x", "efficiency.compile must be true or false or 'auto', got x"),
    ],
)
def test_a_wrong_type_is_named_in_plain_english(flag: str, sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config(PretrainConfig, [], [flag])
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "flag", "sentence"),
    [
        (StepConfig, "--precisions=fp32", "list such as [auto, fp32, bf16, fp16], got fp32"),
        (QualityConfig, "--arms=plain", "arms must be a list such as [plain], got plain"),
        (LaunchesConfig, "--bandwidths=96", "bandwidths must be a list such as [1, 2], got 96"),
    ],
)
def test_a_list_is_suggested_of_items_of_the_key_s_type(
    kind: type, flag: str, sentence: str
) -> None:
    with pytest.raises(UserError) as refused:
        load_config(kind, [], [flag])
    assert sentence in str(refused.value)


def test_an_unknown_flag_names_the_required_ones_that_are_missing() -> None:
    with pytest.raises(UserError, match=r"^--format, --output must be given$"):
        load_config(ExportConfig, [], ["--checkpoint", "x"])
    with pytest.raises(UserError, match=r"no flag --run; --format, --output must be given$"):
        load_config(ExportConfig, [], ["--run=X", "--checkpoint", "x"])


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("vit_s16_etpp_400ep", "pretrain/vit_s16_etpp_400ep"),
        ("vit_s16_etpp", "pretrain/vit_s16_etpp_400ep"),
        ("vit_b16_linear.yaml", "finetune/vit_b16_linear"),
        ("pretrian/vit_s16_mae_800ep", "pretrain/vit_s16_mae_800ep"),
        ("node_8gpus", "cluster/node_8gpu"),
    ],
)
def test_a_config_named_without_its_folder_is_suggested(name: str, meant: str) -> None:
    with pytest.raises(UserError, match="there is no config") as refused:
        find_config(name)
    assert f"did you mean {meant}" in str(refused.value)


def test_a_config_of_one_s_own_is_suggested_and_the_shipped_ones_by_folder(home: Path) -> None:
    Path("mine.yaml").touch()
    for name in ("mine", "mine.yml", "pretrain/mine.yaml", "$PWD/mine"):
        with pytest.raises(UserError, match=r"did you mean .*mine\.yaml\?"):
            find_config(name)
    with pytest.raises(
        UserError, match=r"in /.*: cluster/NAME, demo, finetune/NAME.* \(mae-et configs "
    ):
        find_config("nothing-like-it")


def test_paths_in_a_stranger_s_checkpoint_do_not_expand(home: Path) -> None:
    from mae_et.config.files import config_from_text

    config = config_from_text("data: {root: $HOME/pics}", PretrainConfig)
    assert config.data.root == Path("$HOME/pics")
    assert os.environ["HOME"] not in str(config.data.root)


def test_flags_override_files_wherever_they_stand(home: Path) -> None:
    for number in (1, 2):
        Path(f"{number}.yaml").write_text(f"seed: {number}\noptim: {{batch_size: {number}}}")
    flag, first, second = "--optim.batch_size=8", "--config=1.yaml", "--config=2.yaml"
    for words in ([flag, first, second], [first, flag, second], [first, second, flag]):
        config = load_config(PretrainConfig, [], words)
        assert (config.optim.batch_size, config.seed) == (8, 2)


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--data.mean=0.5", "data.mean must be a list such as [1, 2], got 0.5"),
        ("--data.max_value=abc", "data.max_value must be a number, got abc"),
        ("--data.cache=disk", "data.cache must be one of 'none', 'ram', got disk"),
        ("--data.eval_crop=2", "data.eval_crop must lie in (0, 1], got 2.0"),
        ("--data.rot=x", "there is no key data.rot; did you mean data.root"),
    ],
)
def test_mistakes_in_a_section_that_may_be_null_are_one_sentence(flag: str, sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        config_of("knn", ["run", "--data.root=photos", flag])
    assert str(refused.value).startswith(sentence)
