"""Batches of a rank: from map datasets and from iterable shards."""
