"""Experts in the host: files, loading, attaching, routing."""
