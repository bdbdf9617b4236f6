"""One HTML file about one run or several: curves, curriculum, pictures, figures, config.

The file is whole in itself: no script, font, style or picture from elsewhere, so it opens offline,
can be sent by mail, and shows the same in years. Files of runs are read as data that others wrote:
all that comes from them is escaped by the template engine, and the page's own policy forbids
scripts.
"""

from mae_et.monitoring.report.page import report

__all__ = ["report"]
