"""Stand-ins for `Job` that measure a script."""
