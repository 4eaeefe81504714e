"""The command-line tools behind `tools/*.py`."""
