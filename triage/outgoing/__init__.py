"""Transports that carry a study's answer where no DICOM object goes: HL7, webhook, mail.

Each module has ``send``, which says what became of a letter, and ``reach`` for ``triage check``. A peer that
refuses, stalls or is not there never raises: what it did not acknowledge is simply not sent.
"""
