"""What takes how long. Nothing here is a test: timings on shared processors cannot fail honestly."""
