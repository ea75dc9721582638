"""The application that `serve build` imports: the embedded model with every default.

`serve build casa_serving.cluster.embedded:app` writes the Serve config file of it.
"""

from casa_serving.cluster import build_app

app = build_app({"wait_for_nodes": True})
