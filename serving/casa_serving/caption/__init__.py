"""`casa-caption`: captions videos and cameras, with its own engine or as a client of a server."""
