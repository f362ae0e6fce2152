"""The service: requests, scheduling, the engine, metrics and the gRPC face."""
