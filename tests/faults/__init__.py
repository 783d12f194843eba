"""Faults on purpose: each case does something bad many times and counts what was lost and what went wrong.

python -m tests.faults          few times each, as CI does
python -m tests.faults --long   as often as deploy/RELIABILITY.md says
"""
