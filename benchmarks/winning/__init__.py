"""Win rates of tuned models against their base: judges, motion, prompt sets, VBench's arithmetic, votes of people."""
