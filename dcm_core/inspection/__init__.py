"""What a file, an expert or a run contains, in words and pictures."""
