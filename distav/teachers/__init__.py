"""Frozen networks that know words, and harvest labels for what is heard and what is seen."""
