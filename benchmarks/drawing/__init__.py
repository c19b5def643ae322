"""The drawing of plots, one module each; they need matplotlib, so only `benchmarks.plots` imports them.

Rules:
  1. A plot's `plot` returns a figure, or `None` if nothing was measured that it would show.

Doesn't know: files, the command line.
"""
