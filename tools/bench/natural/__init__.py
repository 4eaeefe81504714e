"""Datasets of real recordings and photographs for the noise benchmark, made from public repositories."""
