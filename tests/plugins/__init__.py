"""What the tests of plugins share: guests, and how they are driven."""
