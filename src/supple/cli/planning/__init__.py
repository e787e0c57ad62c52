"""Commands that answer "how many?" without training or serving: one file a command."""
