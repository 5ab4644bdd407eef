"""Settings: dataclasses to flags, YAML and help."""
