"""The training run itself: batches, model, loop, checkpoints and evaluation. Knows neither gRPC nor Redis."""
