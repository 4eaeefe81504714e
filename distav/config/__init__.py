"""Settings: schema, loading and validation."""
