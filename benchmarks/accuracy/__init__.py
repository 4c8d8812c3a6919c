"""The parts of `python -m benchmarks.reward_accuracy`: what is read, scored, counted and shown."""
