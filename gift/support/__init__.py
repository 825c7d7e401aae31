"""Tools that know nothing of fine-tuning: optional packages, YAML, files, signals, tensors."""
