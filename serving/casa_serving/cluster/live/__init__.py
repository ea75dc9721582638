"""Live sessions on a cluster: the ingress finds a replica with a free slot and relays messages."""
