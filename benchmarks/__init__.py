"""Benchmarks: this engine beside its peers, measured side by side. Run `python -m benchmarks --help`."""
