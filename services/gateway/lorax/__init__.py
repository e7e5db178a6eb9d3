"""LoRAX's own routes: `/`, `/generate`, `/generate_stream`, `/info` and `/tokenize`."""
