"""The actor: one mailbox, one worker, one turn at a time. Knows no SQL, no keys, no files."""
