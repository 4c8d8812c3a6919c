"""What `python -m rewards.serve` and `rewards.remote` are made of: the wire, one worker a reward, HTTP, sessions."""
