"""Shards, labels, the order of samples, and the loader that turns them into batches."""
