"""Programs that show the metrics of a run, and what passes values to them."""
