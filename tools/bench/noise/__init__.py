"""Benchmark of training under label noise and mismatched audio."""
