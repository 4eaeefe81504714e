"""How fast distav is beside what one would use instead, measured in one process, in turn."""
