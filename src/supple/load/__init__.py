"""The load generator of `supple load`."""
