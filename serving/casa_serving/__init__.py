"""The HTTP endpoint: vLLM's own OpenAI server with CASA's defaults and a guard for images."""
