"""Raw media to shards."""
