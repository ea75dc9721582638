"""The application that `serve build` imports: the embedded model with every default.

`serve build casa_serving.cluster.embedded:app` writes the Serve config file of it.
"""

from casa_serving.cluster import build_app

# On CPUs, whatever the machine that writes the file has: the file must work on every cluster.
app = build_app({"device": "cpu", "wait_for_nodes": True})
