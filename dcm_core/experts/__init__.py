"""Experts: as data, read from any naming, matched to a model, and as routed modules in a base's place."""
