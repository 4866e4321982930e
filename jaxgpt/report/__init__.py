"""`report.html`: one file without network or script: key figures, curves, tables, masks, dialogues."""

from jaxgpt.report.charts import axis, chart, downsample, points, smooth
from jaxgpt.report.confusion import confusion_picture
from jaxgpt.report.masks import mask_picture
from jaxgpt.report.page import Html, commands, dialogues, facts, table, text, write
from jaxgpt.report.run import curves, read_metrics, run_report

__all__ = [
    "Html",
    "axis",
    "chart",
    "commands",
    "confusion_picture",
    "curves",
    "dialogues",
    "downsample",
    "facts",
    "mask_picture",
    "points",
    "read_metrics",
    "run_report",
    "smooth",
    "table",
    "text",
    "write",
]
