"""The report page: a compilation as one HTML file."""

from reparam.page.page import Block, Chart, Latency, chart_of, distinct_blocks, render, time, write

__all__ = ["Block", "Chart", "Latency", "chart_of", "distinct_blocks", "render", "time", "write"]
