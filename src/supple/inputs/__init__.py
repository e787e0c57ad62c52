"""Files that a person hands in: measurements, finished runs, traces."""
