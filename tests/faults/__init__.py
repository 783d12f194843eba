"""Faults on purpose: each case does something bad many times and counts what was lost and what went wrong."""
