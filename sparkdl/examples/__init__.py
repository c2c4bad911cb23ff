"""Programs to start from: each runs in seconds, on data that it makes."""
