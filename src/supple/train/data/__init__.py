"""Data loaders: a rank's batches, from map datasets and from iterable shards."""
