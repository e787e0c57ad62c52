"""What a service answers about itself: metadata, configuration, statistics, pages."""
