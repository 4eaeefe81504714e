"""The phases of a run, one per file."""
