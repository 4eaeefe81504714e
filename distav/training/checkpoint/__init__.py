"""Checkpoints: writing, verifying and restoring."""
