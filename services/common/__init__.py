"""What every service shares: configuration, errors, gRPC plumbing, logs and traces. It imports no service."""
