"""What an operator may set: each limit is declared once, for command line, cluster configuration and page."""
