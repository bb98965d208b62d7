"""Volumes: what a container sees besides its root file system."""
