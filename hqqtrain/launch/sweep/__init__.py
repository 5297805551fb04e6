"""Sweeps: several jobs on this machine, their table and their plots."""
