"""Read the user's input files: measurements, finished runs, traces, model descriptions."""
