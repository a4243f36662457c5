"""Exchange with other programs' files: adapters and base models come and go unchanged."""
