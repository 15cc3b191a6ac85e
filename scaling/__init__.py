"""Scaling laws from a results table: fits with intervals, figures and one self-contained report."""
