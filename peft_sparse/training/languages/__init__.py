"""Batches of several languages, and the adapters that go with them."""
