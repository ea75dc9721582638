"""The operator's options: each limit is declared once, for command line, cluster configuration and page."""
