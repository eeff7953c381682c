"""A run as one HTML page that anyone can open: numbers, plots, answers, dropouts, the job.

`reading` brings a run directory into shape, `canvas` and `plots` draw, `page` fills the templates.
"""

from fedtune.server.report.page import write_comparison, write_report

__all__ = ["write_comparison", "write_report"]
