"""Everything that speaks DICOM: listening, reading, choosing, writing, sending."""
