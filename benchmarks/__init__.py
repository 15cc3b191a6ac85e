"""Benchmarks that run on a machine of their own; each is one command."""
