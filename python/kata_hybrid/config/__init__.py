"""Configuration: ``configuration.toml`` as Kata writes it, in frozen values."""
