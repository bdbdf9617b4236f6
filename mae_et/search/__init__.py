"""Search a curriculum for a dataset and a model: `mae-et search`."""

from typing import TYPE_CHECKING

from mae_et.lazy import lazy_exports

if TYPE_CHECKING:
    from mae_et.search.config import SearchConfig as SearchConfig
    from mae_et.search.config import SearchOptions as SearchOptions
    from mae_et.search.driver import search as search
else:
    __getattr__, __dir__, __all__ = lazy_exports(
        __name__,
        {
            "mae_et.search.config": ["SearchConfig", "SearchOptions"],
            "mae_et.search.driver": ["search"],
        },
    )
