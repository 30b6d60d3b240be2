"""From raw text to packed rows of token ids."""
