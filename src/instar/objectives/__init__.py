"""Pure functions on arrays: what is minimised."""
