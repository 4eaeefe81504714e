"""The memory bank, its exact softmax and exact k-nearest-neighbor search."""
