"""The names that people know, as specs, and how other programs store them."""
