"""The pages on one run, several runs, adapters, and a search for the intrinsic dimension."""
