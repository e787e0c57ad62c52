"""One optimizer step: micro-batches, one reduction, one update, and what is measured of it."""
