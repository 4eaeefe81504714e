"""The phases of a run: each is a function of the run and its own settings."""
