"""Training data: find, read, encode and cache clips and captions."""
