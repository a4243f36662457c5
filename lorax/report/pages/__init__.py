"""The pages: of one run, of several, of adapters, of a search for the intrinsic dimension."""
