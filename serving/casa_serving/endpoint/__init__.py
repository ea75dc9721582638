"""What stands between a client and vLLM's OpenAI server: guards of requests and media, errors in OpenAI's shape."""
