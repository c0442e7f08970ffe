"""Describe a file, an expert or a run in text and pictures."""
