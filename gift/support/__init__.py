"""Tools that know nothing of fine-tuning: optional packages, YAML, signals, tensors, recipes."""
