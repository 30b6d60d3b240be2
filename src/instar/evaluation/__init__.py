"""What a trained model is worth: perplexity, reports."""
