"""Labels and pairs that look wrong, on a page to judge them by."""
