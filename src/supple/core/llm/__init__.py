"""Plans for a served language model without running it."""
