"""`casa-caption`: captions videos and cameras, with an engine in its process or as a client of a server."""
