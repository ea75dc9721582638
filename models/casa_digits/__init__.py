"""casa-tiny-digits, the demo model that reads handwritten digits: its data, training, evaluation and videos.

The trained checkpoint itself is part of the core (`casa_engine.digits.checkpoint_path`), which needs nothing of this.
"""
