"""Models put to use: completions in bulk, and conversations."""
