"""The platform's index and annotation files to the sample table."""
