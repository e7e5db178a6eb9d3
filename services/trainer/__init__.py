"""The trainer: fine-tuning jobs, the workers that run them, and the publishing of what they make."""
