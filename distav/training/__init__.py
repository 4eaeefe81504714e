"""Runs, phases, checkpoints and reports."""
