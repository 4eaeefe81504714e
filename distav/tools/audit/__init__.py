"""A page for reviewing labels and pairs."""
