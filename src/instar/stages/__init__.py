"""The recipes; each reads from top to bottom."""
