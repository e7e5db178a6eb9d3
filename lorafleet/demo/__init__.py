"""The demo: fine-tune an adapter for each of some tasks, serve them mixed, and measure both."""
