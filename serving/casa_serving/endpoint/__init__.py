"""Layer between clients and vLLM's OpenAI server: checks of requests and media, errors in OpenAI's format."""
