"""The application that `serve build` imports: the embedded model with every default.

`serve build casa_serving.cluster.embedded:app` writes the Serve config file of it.
"""

from casa_serving.cluster import build_app

# On CPUs, whatever the machine has on which the file is written: the file must fit every cluster.
app = build_app({"device": "cpu", "wait_for_nodes": True})
