"""``kata-hybrid``, the operator's command."""
