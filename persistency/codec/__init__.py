"""Codecs: values to bytes and back. Pure: no I/O, no clock, no threads."""
