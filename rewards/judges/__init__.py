"""Judges: vision-language models asked about a clip or about two, over an endpoint or in this process.

A published judge model should be asked with its authors' prompt: copy it from their repository into a file and name it
with `template`. The templates beside this file are for general models. What answers look like is a matter of the
formats in `answers`, which are the published ones.
"""
