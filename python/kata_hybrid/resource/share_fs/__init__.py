"""The folder a sandbox shares with its guest, and the daemon that serves it."""
