"""Search a curriculum for a data set and a model: `mae-et search`."""

from mae_et.search.config import SearchConfig, SearchOptions
from mae_et.search.driver import search

__all__ = ["SearchConfig", "SearchOptions", "search"]
