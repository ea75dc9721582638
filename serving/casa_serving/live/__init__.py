"""Live captioning in the engine: sessions, the WebSocket that carries them, and its client."""
