"""The only code that imports Ray: workers, the backend that holds them, the controller."""
