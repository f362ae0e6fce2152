"""The degradation card: what long prompts cost a served model in latency, attention and answers."""
