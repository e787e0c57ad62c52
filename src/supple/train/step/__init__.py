"""One optimizer step: micro-batches, gradient reduction, update, and its measurements."""
