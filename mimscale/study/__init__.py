"""Experiments as a graph of runs, what its results say, and how sure that is. `launch.study` runs the graph."""
