"""Benchmarks of distav and its peers."""
