"""General tools without fine-tuning: optional packages, YAML, files, signals, tensors."""
