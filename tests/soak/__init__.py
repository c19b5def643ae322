"""The long forms of the tests that take chances: `python -m tests.soak`. Each part has a module of its own."""
