"""One HTML file about one or several runs: curves, curriculum, images, figures, config.

The file is self-contained (no scripts, and no external fonts, styles or images), so it opens
offline and can be mailed. Run folders are untrusted: the template engine escapes everything read
from them, and the page's content security policy forbids scripts.
"""

from mae_et.monitoring.report.page import report

__all__ = ["report"]
