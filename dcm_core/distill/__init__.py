"""Distillation: training of the semantic and the detail expert."""
