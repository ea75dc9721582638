"""Exit statuses of serving's commands beside 0, 1 (an error) and 2 (usage)."""

INTERRUPTED = 130  # It was stopped by a signal before it was done; what a shell reports after Ctrl-C.
