"""Audio and visual encoders, heads and the event parser."""
