"""The platform's contract: task and settings in; monitor, results and errors out."""
