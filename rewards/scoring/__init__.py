"""The parts of `python -m rewards.score`: what is scored, how rewards are asked, what is written, what is summed up."""
