"""Running a program: cache state, prefill and decode, generation."""
