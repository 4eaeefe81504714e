"""Process group, collectives and detection of stalled ranks."""
