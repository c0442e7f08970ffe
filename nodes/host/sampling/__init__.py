"""Sampling in the host: schedules, plans, two models in one trajectory, runs."""
