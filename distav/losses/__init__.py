"""The training losses, one file each."""
