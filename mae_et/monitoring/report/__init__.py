"""One HTML file about one or several runs: curves, curriculum, images, figures, config.

The file is self-contained, without scripts and without fonts, styles or images from elsewhere, so
it opens offline and can be mailed. Run folders are untrusted: the template engine escapes all that
is read from them, and the page's content security policy forbids scripts.
"""

from mae_et.monitoring.report.page import report

__all__ = ["report"]
