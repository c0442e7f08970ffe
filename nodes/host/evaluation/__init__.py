"""Compare models in the host, and search for better settings."""
