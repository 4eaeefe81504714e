"""Looking into shards: whether they are as written, what is in them in figures, and some of their clips."""
