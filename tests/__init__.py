"""The tests: each promise has one that tries to break it."""
