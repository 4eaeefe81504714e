"""Cutting of media files into clips."""
