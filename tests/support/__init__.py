"""What tests are made of: tiny models, adapters and files, oracles, and the cases that several folders try."""
