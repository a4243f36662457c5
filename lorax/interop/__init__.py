"""Reading and writing other programs' files: adapters and base models, without loss."""
