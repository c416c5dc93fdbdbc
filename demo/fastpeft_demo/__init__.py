"""The folder of a small RoBERTa, for `from_pretrained`."""
