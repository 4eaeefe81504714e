"""Verify, describe and preview the shards of a dataset."""
