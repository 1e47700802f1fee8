"""Text: CLIP's tokenizer, prompt weights, and its text encoder."""
