"""Shutdown of a server process: requests may finish within a bound, the rest get an error, and the process exits."""
