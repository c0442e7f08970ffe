"""Experts: their data, reading them from files, matching them to a model, and running them in the base's place."""
