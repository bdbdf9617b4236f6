"""Names of timm's models. timm is imported when needed: it loads PyTorch, which takes seconds."""

from mae_et.config.suggestions import did_you_mean, suggest
from mae_et.errors import UserError


def is_model(name: str) -> bool:
    """Return whether timm has a model of this name."""
    if "/" in name:  # a path
        return False
    import timm

    return bool(timm.is_model(name))


def suggest_model(name: str, part: str = "") -> str:
    """Suggest timm's models whose names start with `name` or are similar, and contain `part`.

    Returns:
        As `suggest`; an empty string if timm has a model of this name.
    """
    if is_model(name):
        return ""
    import timm

    known = [model for model in timm.list_models() if part in model]
    longer = sorted((model for model in known if name and model.startswith(name)), key=len)
    return did_you_mean(longer[:2]) or suggest(name, known)


def check_model(key: str, name: str) -> None:
    """Refuse the value of a key that names no timm model (`hf-hub:...` is not checked)."""
    if ":" not in name and not is_model(name):
        raise UserError(f"{key}: timm has no model {name!r}{suggest_model(name)}")
