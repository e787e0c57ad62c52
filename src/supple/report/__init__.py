"""What a person looks at: live lines, tables, pictures, the event log, TensorBoard."""
