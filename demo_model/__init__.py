"""The model that every machine can run, and how it is made."""
