"""The subcommands of `vidt`."""
