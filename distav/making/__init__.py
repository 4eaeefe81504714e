"""From raw clips to shards: sources of clips, encoding, and the writer."""
