"""Training data: clips and captions found, read, encoded and cached."""
