"""Object storage, the local cache and tar files."""
