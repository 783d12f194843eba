"""Data sets, augmentation, one trainer and one evaluator for the networks of ``triage.models``."""
