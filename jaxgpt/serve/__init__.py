"""An OpenAI-compatible service around an engine."""
