"""Drawing with Pillow: text in any script, and the figures that a run logs."""
