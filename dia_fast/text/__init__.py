"""Transcripts: bytes that the encoder reads, remarks about them, and the cuts of a long one."""
