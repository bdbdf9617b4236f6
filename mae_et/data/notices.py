"""Print facts about a dataset once, from the main rank."""

from functools import lru_cache

from mae_et.runtime.console import is_main, say


@lru_cache(maxsize=256)
def notify(fact: str) -> None:
    """Print a line to stderr, the first time that this process states it."""
    if is_main():
        say(f"mae-et: {fact}")
