"""Programs that are killed, that exit, or that eat memory, for the tests beside them."""
