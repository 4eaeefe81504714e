"""The global cross-modal memory bank: sharded rows, exact softmax over them, exact nearest neighbours."""
