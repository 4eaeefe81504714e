"""Metrics, probes and embeddings of a dataset."""
