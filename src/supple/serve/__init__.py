"""A model behind a protocol: its loading, its requests, its surface. No Ray."""
