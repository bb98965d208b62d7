"""What containerd calls: the task service, and the events it is told."""
