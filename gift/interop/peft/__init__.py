"""Adapter folders of Hugging Face PEFT: loading and saving."""
