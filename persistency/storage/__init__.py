"""Storage: what makes bytes last. Knows no threads, no tuples, no futures; time is an argument."""
