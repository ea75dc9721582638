"""`casa bench`: what a frame, a conversation, a live session and a second question cost, and who else measured it."""
