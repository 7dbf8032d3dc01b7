"""MAD-G: a hypernetwork that generates bottleneck adapters from typological vectors (tuner type `MAD_G`)."""
