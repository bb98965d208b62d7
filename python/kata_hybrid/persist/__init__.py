"""State on disk: written whole or not at all, read back by whoever has to clean up."""
