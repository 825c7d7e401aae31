"""WeightDelta folders of Hugging Face PEFT, read and written."""
