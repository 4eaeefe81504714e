"""Coverage benchmark: estimates of the label correction compared with known truth on synthetic problems."""
