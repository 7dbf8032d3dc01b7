"""SpIEL: counting updates, watching gradients, dropping and growing weights."""
