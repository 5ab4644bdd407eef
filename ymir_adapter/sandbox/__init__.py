"""The platform, played by a program."""
