"""The controller of one job, its socket and its interfaces: no Ray, no torch."""
