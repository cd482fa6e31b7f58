"""The demo: a problem of independent parts, a tokenizer, and what the small base model was trained on."""
