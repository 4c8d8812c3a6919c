"""What `python -m alignment.annotate` is made of."""
