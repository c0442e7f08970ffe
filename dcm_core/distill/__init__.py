"""Distillation: train the semantic and the detail expert."""
