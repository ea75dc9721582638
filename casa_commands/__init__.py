"""The console scripts. Importing this package imports nothing that could be missing."""
