"""What a sandbox and its containers are given: shared folder, root file systems, volumes.

Prepares the host and returns guest values; it never calls the agent.
"""
