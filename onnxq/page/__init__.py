"""The report page: one HTML file that holds all it shows and asks the network for nothing.

Charts are Vega-Lite's, which vl-convert-python brings whole. Of the libraries that a maintained
Python package ships as JavaScript, it draws SVG, which prints and zooms sharply and takes its
colours from the page, and is the smallest: 0.90 MB beside 1.27 MB for Bokeh, 4.8 MB for Plotly.
"""

from onnxq.page.render import page, require_libraries
from onnxq.page.runs import Run, read_runs, runs_in

__all__ = ["Run", "page", "read_runs", "require_libraries", "runs_in"]
