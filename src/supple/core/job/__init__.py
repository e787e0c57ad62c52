"""One running job: its lifecycle, its members, its sample order, the advice to it."""
