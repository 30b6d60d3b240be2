"""The names that people know, as specs."""
