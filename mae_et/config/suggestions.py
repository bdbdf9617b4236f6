"""Suggest corrections of mistyped keys, configs and commands."""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, get_type_hints

import yaml

from mae_et.config.key_checks import sections_of, unknown_keys

# Names in facebookresearch/mae, timm's train.py and DINO that share no part with our key.
_CALLED_ELSEWHERE = {
    "accum_iter": "efficiency.micro_batch",
    "amp": "efficiency.precision",
    "amp_dtype": "efficiency.precision",
    "arch": "model.encoder",
    "backbone": "model.encoder",
    "blr": "optim.base_lr",
    "color_jitter": "data.augment",
    "cls_token": "model.pool",
    "data_dir": "data.root",
    "data_path": "data.root",
    "drop": "model.head_dropout",
    "finetune": "model.checkpoint",
    "global_pool": "model.pool",
    "grad_accum_steps": "efficiency.micro_batch",
    "grad_checkpointing": "efficiency.gradient_checkpointing",
    "img_size": "model.image_size",
    "initial_checkpoint": "model.checkpoint",
    "input_size": "model.image_size",
    "log_dir": "output.dir",
    "model_ema": "optim.ema",
    "model_ema_decay": "optim.ema",
    "norm_pix_loss": "model.target",
    "opt": "optim.optimizer",
    "reprob": "recipe.erasing",
    "resume": "output.dir",
    "torchcompile": "efficiency.compile",
    "warmup_epochs": "optim.warmup_fraction",
}

# Earlier names of keys, where the rules below would suggest another key or none.
_CALLED_BEFORE = {
    "broken": "data.on_error",
    "broken_share": "data.max_bad_fraction",
    "decoder_width": "model.decoder_embed_dim",
    "encoder_width": "model.encoder_embed_dim",
    "skip_nonfinite": "optim.max_skipped_updates",
}


def suggest(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean ...?` with the closest of the known words, or an empty string."""
    return did_you_mean(difflib.get_close_matches(word, list(known), n=2, cutoff=0.7))


def suggest_key(key: str, known: Sequence[str]) -> str:
    """Suggest a dotted key or flag: same last name, part of the last name, or similar spelling.

    The names that other trainers, or earlier versions, use for a key are recognised too.
    """
    last = key.lstrip("-").rpartition(".")[2].replace("-", "_")
    elsewhere = (_CALLED_ELSEWHERE | _CALLED_BEFORE).get(last)
    flags = [name for name in known if name.lstrip("-") == elsewhere]
    if flags:
        return did_you_mean(flags)
    meant = [name for name in known if re.split(r"[.]|--", name)[-1] == last]
    # lr is part of base_lr and min_lr; in the order of the config
    meant = meant or [name for name in known if last in re.split(r"[.]|--", name)[-1].split("_")]
    meant = meant or difflib.get_close_matches(key, known, n=2, cutoff=0.75)
    return did_you_mean(meant[:2])


def describe_unknown_key(text: str, kind: type[Any]) -> str | None:
    """Report the first key of a config's text that a kind of config does not have.

    Returns:
        `line 3: there is no key optim.base_lrr; did you mean optim.base_lr?`, or None.
    """
    unknown = unknown_keys(text, kind)
    if not unknown:
        return None
    key, known = unknown[0], list(keys_of(kind))
    line = f"line {_line_of(key, text)}"
    if key in known:
        section, _, inside = key.rpartition(".")
        return (
            f"{line}: {key} is written as a section and a key in it, {section}: {{{inside}: ...}}"
        )
    return f"{line}: there is no key {key}{suggest_key(key, known)}"


def keys_of(kind: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a config, its sections' included."""
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        section = next(sections_of(hints[field.name]), None)
        yield f"{prefix}{field.name}"
        if section is not None:
            yield from keys_of(section, f"{prefix}{field.name}.")


def _line_of(key: str, text: str) -> int:
    """Return the line of a dotted key in a YAML text that has it, counted from 1."""
    node: Any = yaml.compose(text, Loader=yaml.SafeLoader)
    line = 1
    dotted = any(name.value == key for name, _ in node.value)
    for part in [key] if dotted else key.split("."):
        for name, value in node.value:
            if name.value == part:
                line, node = name.start_mark.line + 1, value
                break
    return line


def did_you_mean(meant: Sequence[str]) -> str:
    """Return `; did you mean ...?`, or an empty string without words."""
    return f"; did you mean {' or '.join(meant)}?" if meant else ""
