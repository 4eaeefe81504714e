"""Label noise and noisy correspondence: estimation and correction."""
