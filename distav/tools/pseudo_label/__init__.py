"""Segment pseudo-labels from pretrained teachers."""
