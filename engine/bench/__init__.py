"""How long it takes, beside a named baseline: cases that are held to the reference before they are timed."""
