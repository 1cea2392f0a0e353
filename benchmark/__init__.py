"""How exact our measuring is: every client against a server whose truth is known. `python -m benchmark`."""
