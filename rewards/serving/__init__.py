"""The server of `python -m rewards.serve`: one worker a reward, and the HTTP around them."""
