"""Models in and out: Hugging Face folders, GGUF files, and what Instar saves itself."""
