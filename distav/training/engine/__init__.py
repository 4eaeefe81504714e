"""The DeepSpeed engine and its sharded state."""
