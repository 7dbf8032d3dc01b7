"""Adapters of other libraries, made into ours and back by conversions on disk: no model is loaded, no pickle run."""
