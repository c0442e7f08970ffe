"""Training in the host: its model as the base, encoders, the run and what it shows."""
