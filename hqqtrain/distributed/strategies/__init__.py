"""Strategies of sharding, one file each."""
